"""One rank of `flamingo.train` that multiplies matrices before and after each of its steps.

Virtual processors change their speed by the second, with what their neighbours do, so a peak that was
measured some seconds ago is another machine's. A line of RUN/beside-RANK.jsonl for each step: its
seconds without the wait for data, what it held, pictures that this rank encoded, and its peak around it.
For `benchmarks.step_rate`.
"""

from __future__ import annotations

import json
import sys
import time
from functools import lru_cache
from typing import Any

import torch

from flamingo.data.steps import StepBatches
from flamingo.runtime import dtype_of
from flamingo.train import session
from flamingo.train.__main__ import main
from flamingo.train.flops import product_seconds

SIDE = 8192 if torch.cuda.is_available() else 2048  # of matrices: large enough for the peak
PRODUCTS = 3
HELD = ("flops", "tokens", "targets", "images")


@lru_cache(maxsize=1)
def matrix(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """[SIDE, SIDE], multiplied once already: libraries load at their first call."""
    drawn = torch.randn(SIDE, SIDE, device=device).to(dtype)
    product_seconds(drawn)
    return drawn


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of products in the recipe's arithmetic on this rank's device or cores, just now."""
    a = matrix(device, dtype)
    return 2.0 * SIDE**3 * PRODUCTS / sum(product_seconds(a) for _ in range(PRODUCTS))


class Measured(session.Trainer):
    def train_step(self, step: int, batches: StepBatches) -> dict[str, Any]:
        device, dtype = self.engine.device, dtype_of(self.recipe.autocast)
        before = peak(device, dtype)
        torch.distributed.barrier()  # a rank that was done with it first would count its wait for the others
        began = time.perf_counter()
        record = super().train_step(step, batches)  # it ends with numbers that all ranks have added up
        seconds = time.perf_counter() - began
        line = {"step": step + 1, "seconds": seconds, "peak": (before + peak(device, dtype)) / 2}
        line |= {name: record[name] for name in HELD}
        line["pictures"] = sum(len(batch.pixel_values) for part in batches.values() for batch in part)
        with (self.recipe.run / f"beside-{self.dataset.rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        return record


if __name__ == "__main__":
    session.Trainer = Measured  # type: ignore[misc]
    sys.exit(main())

"""Steps without a finite loss or gradient: skipped by all ranks, kept aside, and limited."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from flamingo.data.steps import StepBatches
from flamingo.data.writing import write_aside
from flamingo.train.group import SharedError
from flamingo.train.metrics import writing
from flamingo.train.precision import LossScale

KEPT = 3  # steps of a run whose batches are written, and that are told; of all others the keys are


class NonFinite:
    """All ranks see the same losses and the same norm, so all decide alike.

    limit: such steps in a row before the run stops. What the search for float16's loss scale
    skips is none of them.
    """

    def __init__(self, run: Path, limit: int, rank: int, say: Callable[[str], None] = lambda _: None):
        self.folder, self.limit, self.rank, self.say = run / "nonfinite", limit, rank, say
        self.row = self.written = 0
        self.steps = self.skipped = 0  # of this process

    def note(
        self,
        step: int,
        losses: Mapping[str, float],
        norm: float,
        local: Mapping[str, float],
        batches: StepBatches,
        scale: LossScale,
    ) -> bool:
        """Whether the step (from 1) was skipped.

        losses: mean of each source over all ranks; local: summed NLL of this rank.
        Raises ValueError on all ranks once there are more than `limit` in a row.
        """
        self.steps += 1
        bad = [name for name, loss in losses.items() if not math.isfinite(loss)]
        if not bad and math.isfinite(norm):
            self.row = 0
            return False
        if not bad and scale.expected():
            return True
        self.row += 1
        self.skipped += 1
        here = [name for name, value in local.items() if not math.isfinite(value)]
        if here or not bad:  # a bad gradient does not tell whose it is
            self.written += 1
            with writing(self.folder, step):
                self._keep(step, here or list(batches), batches, tensors=self.written <= KEPT)
        what = f"the loss of {', '.join(bad)}" if bad else "the gradient"
        if self.row > self.limit:
            raise SharedError(
                f"{what} is not finite at step {step}, nor was it in the {self.row - 1} steps before; "
                f"max_skipped_steps={self.limit}. They changed no weights. A lower optimizer.lr is the usual "
                f"cure; {self.folder} has the samples"
            )
        if self.skipped <= KEPT:
            self.say(f"step {step} left out: {what} is not finite; {self.folder} has its samples")
        return True

    def end(self, start: int) -> None:
        """After the last step: how many were skipped. start: steps that were done before this process.

        Raises ValueError on all ranks where that were all, since the model is then what it was.
        """
        if not self.skipped:
            return
        if self.skipped == self.steps and not start:
            raise SharedError(
                f"none of the {self.steps} steps had a finite loss and gradient, so nothing was learned. A "
                f"lower optimizer.lr is the usual cure; {self.folder} has the samples"
            )
        self.say(f"{self.skipped} of {self.steps} steps were left out: their loss or gradient was not finite")

    def _keep(self, step: int, names: list[str], batches: StepBatches, tensors: bool) -> None:
        """The keys of this rank's micro-batches, and their tensors."""
        self.folder.mkdir(parents=True, exist_ok=True)
        parts = {f"{n}/{i}": batch for n in names for i, batch in enumerate(batches.get(n, []))}
        keys = {part: batch.keys for part, batch in parts.items()}
        place = self.folder / f"step-{step:06d}-rank-{self.rank:05d}"
        place.with_suffix(".json").write_text(json.dumps({"step": step, "keys": keys}, indent=1) + "\n")
        if not tensors:
            return
        saved = {
            f"{part}/{field}": torch.atleast_1d(value.to("cpu").contiguous())
            for part, batch in parts.items()
            for field, value in vars(batch).items()
            if isinstance(value, Tensor)
        }
        write_aside(place.with_suffix(".safetensors"), lambda part: save_file(saved, part))

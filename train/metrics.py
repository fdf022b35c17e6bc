"""What a run writes down and what a person sees of it: JSONL, TensorBoard, the terminal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm


def gates(blocks: nn.ModuleList) -> dict[str, list[float]]:
    """tanh of the gates of every block: 0 is shut."""
    return {
        "gate_attention": [round(b.attn_gate.detach().tanh().item(), 5) for b in blocks],  # type: ignore
        "gate_feed_forward": [round(b.ff_gate.detach().tanh().item(), 5) for b in blocks],  # type: ignore
    }


def flat(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of a nested record as TensorBoard tags: loss/captions, gate_attention/3."""
    for key, value in record.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from flat(value, f"{name}/")
        elif isinstance(value, list):
            yield from flat({str(i): v for i, v in enumerate(value)}, f"{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, float(value)


def _step(line: str) -> int | None:
    """The step of a line of the log; None for one that a killed run left unfinished."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


class Metrics:
    """Rank 0 writes; on the other ranks every method does nothing.

    A resumed run goes on in the same files: records of steps that are done again are dropped.
    """

    def __init__(self, run: Path, steps: int, start: int, writes: bool):
        self.writes, self.steps, self.start = writes, steps, start
        self.began = time.monotonic()
        if not writes:
            return
        from torch.utils.tensorboard import SummaryWriter

        path = run / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if (_step(line) or start + 1) <= start]
        path.write_text("".join(f"{line}\n" for line in kept))
        self.file = path.open("a", buffering=1)
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1)
        self.bar = tqdm(total=steps, initial=start, unit="step", disable=not sys.stderr.isatty())

    def write(self, record: dict[str, Any]) -> None:
        """One step's record; record["step"] counts from 1."""
        if not self.writes:
            return
        step = record["step"]
        self.file.write(json.dumps(record) + "\n")
        for tag, value in flat(record):
            if tag != "step":
                self.board.add_scalar(tag, value, step)
        losses = " ".join(f"{name} {value:.3f}" for name, value in record["loss"].items())
        self.bar.set_postfix_str(f"loss {losses}", refresh=False)
        self.bar.update(step - self.bar.n)
        every = max(1, self.steps // 10)
        if self.bar.disable and (step % every == 0 or step == self.steps):
            done, left = step - self.start, self.steps - step
            minutes = (time.monotonic() - self.began) / done * left / 60
            print(f"step {step}/{self.steps}  loss {losses}  about {minutes:.0f} min left", flush=True)

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        if self.writes:
            self.bar.write(text)

    def close(self) -> None:
        if self.writes:
            self.bar.close()
            self.file.close()
            self.board.close()

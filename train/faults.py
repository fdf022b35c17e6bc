"""Bad samples that a run met: `skipped.jsonl`, counts by kind, and the limit that stops the run."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from flamingo.data.errors import Skipped
from flamingo.data.writing import write_text
from flamingo.train.engine import gather_objects
from flamingo.train.group import SharedError
from flamingo.train.metrics import writing

SHOWN = 8  # bad samples that the last message lists


class Faults:
    """Every rank knows all that were met, so all stop together. Rank 0 writes.

    limit: different bad samples that a run replaces before it stops.
    """

    def __init__(self, run: Path, start: int, limit: int, rank: int):
        self.path, self.limit, self.writes = run / "skipped.jsonl", limit, rank == 0
        self.keys: set[str] = set(gather_objects(self._kept(start) if self.writes else None)[0])

    def note(self, step: int, skipped: list[Skipped]) -> dict[str, int]:
        """What this rank skipped at a step (all ranks call) -> how many of each fault, over all ranks.

        Raises SharedError on all ranks once there are more than `limit`.
        """
        every = [bad for part in gather_objects(skipped) for bad in part]
        if self.writes and every:
            with writing(self.path, step), self.path.open("a") as file:
                file.writelines(json.dumps({"step": step, **bad._asdict()}) + "\n" for bad in every)
        self.keys.update(bad.key for bad in every)
        if len(self.keys) > self.limit:
            last = "\n".join(f"  {bad.key}: {bad.fault}: {bad.detail}" for bad in every[-SHOWN:])
            raise SharedError(
                f"{len(self.keys)} bad samples by step {step}, max_bad_samples={self.limit}: "
                "`flamingo data verify` finds and repairs them, or raise the limit. "
                f"{self.path} lists all; the last:\n{last}"
            )
        return dict(Counter(bad.fault for bad in every))

    def _kept(self, start: int) -> list[str]:
        """Keys met before step `start`; what is done again is written again."""
        if not self.path.exists():
            return []
        lines = [line for line in self.path.read_text().splitlines() if _step(line, start) <= start]
        write_text(self.path, "".join(f"{line}\n" for line in lines))
        return [json.loads(line)["key"] for line in lines]


def _step(line: str, start: int) -> int:
    """The step of a line; beyond `start` for one that a killed run left unfinished."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return start + 1

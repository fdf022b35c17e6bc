"""What a run writes down: one line of JSON a step, which trackers and the person get too."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from flamingo.data.writing import write_text
from flamingo.train.live import view
from flamingo.train.trackers import Trackers

FILE = "metrics.jsonl"


def flat(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of a nested record as tags of trackers: loss/captions, gate_attention/3."""
    for key, value in record.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flat(value, f"{name}/")
        elif isinstance(value, list):
            yield from flat({str(i): v for i, v in enumerate(value)}, f"{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, float(value)


def finite(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record without what is not finite, None for it in lists: JSON has no such numbers."""
    kept = {key: _finite(value) for key, value in record.items()}
    return {key: value for key, value in kept.items() if value is not None or record[key] is None}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return finite(value)
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def writing(what: str | Path, step: int) -> Iterator[None]:
    """An error while something of a step is written says of what: by itself it names no file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{what} cannot be written at step {step} ({getattr(error, 'strerror', None) or error}): "
            "make room, or choose run=FOLDER on another disk; --resume goes on from the last checkpoint"
        ) from error


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

    def __init__(
        self,
        run: Path,
        steps: int,
        start: int,
        writes: bool,
        trackers: Sequence[str] = ("tensorboard",),
        settings: Mapping[str, Any] | None = None,
    ):
        """trackers, settings: their names, and the recipe as they shall keep it."""
        self.writes = writes
        if not writes:
            return
        path = run / FILE
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if (_step(line) or start + 1) <= start]
        # A run that is killed here must not lose its past.
        write_text(path, "".join(f"{line}\n" for line in kept))
        self.file = path.open("a", buffering=1)
        said: list[str] = []
        self.trackers = Trackers(trackers, run, start, settings or {}, said.append)
        # The view begins last, so that what the trackers print of themselves stays above it.
        self.view = view(run.name, steps, start)
        self.trackers.warn = self.view.say
        for text in said:
            self.view.say(text)

    def write(self, record: Mapping[str, Any]) -> None:
        """One step's record; record["step"] counts from 1."""
        if not self.writes:
            return
        record = finite(record)
        with writing(self.file.name, record["step"]):
            self.file.write(json.dumps(record, allow_nan=False) + "\n")
        scalars = {tag: value for tag, value in flat(record) if tag != "step"}
        self.trackers.write(scalars, record["step"])
        self.view.update(record)

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        if self.writes:
            self.view.say(text)

    def close(self) -> None:
        """The view ends first: what trackers print of themselves comes below it."""
        if self.writes:
            self.view.close()
            with suppress(OSError):  # what could not be written was told by `write`
                self.file.close()
            self.trackers.warn = print
            self.trackers.close()

"""A run is asked to stop: by SIGTERM, SIGUSR1, its wall-time limit, or a file RUN/stop.

A signal only leaves a wish, so the step is always finished. After each step the ranks agree: the
wish of one stops all after the same step, with a checkpoint. The process then ends with status 75
(EX_TEMPFAIL of sysexits.h: run me again), and RUN/stopped.json says why. Under torchrun it ends
with 0, because torchrun would take any other status for a fault and start the ranks again.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType, TracebackType

import torch

from flamingo.data.writing import write_text

STATUS = 75
ASK, ANSWER = "stop", "stopped.json"  # in the run's folder
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(Exception):
    """The run ended early because it was asked to, with a checkpoint; `--resume` goes on."""


class Stopping:
    """Listens from its making to `close`, in the main thread; a context manager.

    Make it before anything that takes long, and call `limit` when the recipe is read.
    """

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._seconds = float("inf")
        self._file: Path | None = None
        self._wish: str | None = None
        self._before = {number: signal.signal(number, self._heard) for number in SIGNALS}

    def limit(self, wall_minutes: float | None, run: Path | None = None) -> None:
        """wall_minutes: since the process began to listen. run: its folder, looked at by rank 0 only."""
        self._seconds = 60 * wall_minutes if wall_minutes else float("inf")
        self._file = run / ASK if run else None

    @property
    def wish(self) -> str | None:
        """Why this rank wants to stop, None when it does not."""
        if not self._wish and time.monotonic() - self._began > self._seconds:
            self._wish = f"wall_minutes={self._seconds / 60:g} have passed"
        if not self._wish and self._file and self._file.exists():
            self._wish = f"{self._file} is there"
        return self._wish

    def agreed(self, device: torch.device | str = "cpu") -> str | None:
        """Why all ranks stop now, the same words on every rank; None: nobody asked.

        To be called by all ranks at the same place: one all-reduce of one number.
        """
        wish = self.wish
        if not torch.distributed.is_initialized():
            return wish
        asked = torch.tensor(int(wish is not None), device=device)
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        if not asked.item():
            return None
        wishes: list[str | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(wishes, wish)
        return next(f"{words} (rank {rank})" for rank, words in enumerate(wishes) if words)

    def close(self) -> None:
        """The handlers that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __enter__(self) -> Stopping:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _heard(self, number: int, frame: FrameType | None) -> None:
        self._wish = self._wish or signal.Signals(number).name


def answer(run: Path, step: int, reason: str) -> None:
    """By rank 0, when the checkpoint is complete: RUN/stopped.json, for whoever starts it again."""
    write_text(run / ANSWER, json.dumps({"step": step, "reason": reason}) + "\n")
    (run / ASK).unlink(missing_ok=True)


def forget(run: Path) -> None:
    """By rank 0, when a run begins: what earlier parts of it were asked no longer counts."""
    for name in (ASK, ANSWER):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            (run / name).unlink()


def status(environ: Mapping[str, str] | None = None) -> int:
    """Exit status of a run that was asked to stop."""
    environ = os.environ if environ is None else environ
    return 0 if "TORCHELASTIC_RUN_ID" in environ else STATUS

"""One fresh process per side of a benchmark: it loads, then trains a step whenever it is asked.

Peak memory is of the whole process above its state after loading, so what only one side keeps in a
step (logits, gradients, the optimizer's state) counts, and libraries and frozen weights do not.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

MIB = 2**20


def resident() -> float:
    """Memory of this process in MiB: the accelerator's where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / MIB
    return _status("VmRSS")


def peak() -> float:
    """The most that `resident` has been since `forget_peak`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / MIB
    return _status("VmHWM")


def forget_peak() -> None:
    """Give freed memory back and count the peak from here on. Raises OSError where Linux forbids."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def _serve(pipe: Any, load: Callable[[], Any], steps: list[Any]) -> None:
    """load() -> an object with prepare(step) and train(batch)."""
    from flamingo.runtime import quiet_libraries, share_cores

    quiet_libraries()
    share_cores()  # of all sides alike; whether freed memory is kept, each side says
    torch.manual_seed(0)
    try:
        side = load()
        batches = [side.prepare(step) for step in steps]
        for parameter in side.model.parameters():  # pages of a mapped file count once they are read
            parameter.sum()
        forget_peak()
        loaded = resident()
        pipe.send({"loaded": loaded})
        while (number := pipe.recv()) is not None:
            began = time.perf_counter()
            result = side.train(batches[number % len(batches)])
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            result["seconds"] = time.perf_counter() - began
            targets = result.pop("targets").sort().values
            result["targets"] = len(targets)
            result["digest"] = sha256(targets.cpu().numpy().tobytes()).hexdigest()[:12]
            pipe.send({**result, "peak": peak() - loaded})
    except Exception as error:
        pipe.send(error)
        raise


class Worker:
    """A side in a process of its own. `with Worker(load, steps) as worker: worker.step(0)`."""

    def __init__(self, load: Callable[[], Any], steps: list[Any]):
        context = multiprocessing.get_context("spawn")
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(there, load, steps), daemon=True)
        self.process.start()
        there.close()
        self.loaded = self._answer()["loaded"]

    def step(self, number: int) -> dict[str, Any]:
        """Train on step `number`: its seconds, losses, tokens, images, targets and peak memory in MiB."""
        self.pipe.send(number)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        try:
            answer = self.pipe.recv()
        except EOFError:
            raise RuntimeError("a side of the benchmark ended without an answer (out of memory?)") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()

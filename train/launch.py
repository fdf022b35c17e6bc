"""`flamingo train`: starts one process per GPU, or two on a CPU, with DeepSpeed's launcher."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from types import FrameType

from flamingo.runtime import cores, default_processes
from flamingo.train.config import RunConfig, read_recipe

ASK_SECONDS = 2.0


def environment(ranks: int) -> dict[str, str]:
    """The environment of the ranks."""
    import torch

    env = dict(os.environ)
    if not torch.cuda.is_available():
        env["DS_ACCELERATOR"] = "cpu"
        env.setdefault("OMP_NUM_THREADS", str(max(1, cores() // ranks)))
    return env


def launch(
    recipe: str,
    overrides: list[str],
    resume: bool,
    ranks: int | None,
    accept_changed_shards: bool = False,
    module: str = "flamingo.train",
    read: Callable[[str, list[str]], RunConfig] = read_recipe,
) -> int:
    """Check the recipe here, where its errors are short, then run it. Returns the exit status.

    module: that trains, as one rank; read: its recipes.
    """
    read(recipe, overrides)
    words = [recipe, *overrides]
    words += ["--resume"] if resume else []
    words += ["--accept-changed-shards"] if accept_changed_shards else []
    return start(module, words, ranks)


def start(module: str, words: list[str], ranks: int | None) -> int:
    """Run `python -m module words...` as so many ranks of this machine. Returns the exit status."""
    ranks = ranks or default_processes()
    check_processes(ranks)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
    command += ["--hostfile", os.devnull]  # this machine alone, whatever lies in /job/hostfile
    command += ["--quiet", "--master_port", str(_free_port()), "--module", module, *words]
    return supervise(command, environment(ranks))


def check_processes(ranks: int) -> None:
    """Raises ValueError when there are GPUs, but not one for each process."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else None
    if gpus is not None and ranks > gpus:
        raise ValueError(
            f"--processes {ranks}, but this machine shows {gpus} GPU{'s' * (gpus != 1)}: each process "
            "needs one. Give fewer, or see which CUDA_VISIBLE_DEVICES hides"
        )


def supervise(command: list[str], env: dict[str, str]) -> int:
    """Run a launcher to its end; its exit status. SIGTERM, SIGUSR1, SIGHUP reach the ranks as SIGUSR1.

    DeepSpeed's launcher dies of a SIGUSR1, leaves its ranks behind on a SIGTERM to its outer half,
    and kills them 30 seconds after one to its inner. So it runs in a session of its own, deaf to
    SIGUSR1, and whoever asks us to stop asks the ranks. They end when their step is saved.
    """
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True

    heard = [signal.SIGTERM, signal.SIGUSR1]
    heard += [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []  # nohup
    handlers = {number: signal.getsignal(number) for number in heard}
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # what the launcher inherits
    process = subprocess.Popen(command, env=env, start_new_session=True)
    for number in heard:
        signal.signal(number, ask)
    try:
        while True:
            try:
                status = process.wait(0.2 if not asked else ASK_SECONDS)
                return status if status >= 0 else 128 - status  # as a shell has it
            except subprocess.TimeoutExpired:
                if asked:  # again and again: a rank that is just starting does not listen yet
                    _signal_all(process, signal.SIGUSR1)
            except KeyboardInterrupt:
                _signal_all(process, signal.SIGINT)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _signal_all(process: subprocess.Popen, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

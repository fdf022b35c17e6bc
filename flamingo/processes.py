"""Several processes that share one job: who starts them, which one this is, where they meet, which GPU
is whose."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta


def member() -> tuple[int, int]:
    """(rank, world size) that a launcher announced; (0, 1) without one. A Slurm job whose batch script
    calls this without srun has one process."""
    names = [("RANK", "WORLD_SIZE")]
    if {"SLURM_STEP_ID", "SLURM_STEPID"} & os.environ.keys():
        names.append(("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))
    for rank, world in names:
        if rank in os.environ and world in os.environ:
            return int(os.environ[rank]), int(os.environ[world])
    return 0, 1


def check_alone(world: int, processes: int | None) -> None:
    """Raises ValueError where a launcher and --processes both say how many there are."""
    if world > 1 and processes is not None:
        raise ValueError(
            f"--processes {processes}, but a launcher started {world}: leave it out, or start this alone"
        )


@contextmanager
def together(rank: int, world: int) -> Iterator[Callable[[], object]]:
    """Gives a function that waits for all processes of a launcher; alone, nobody waits.

    Raises ValueError where the launcher did not say at which address they meet.
    """
    if world == 1:
        yield lambda: None
        return
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise ValueError(
            f"{world} processes, but {' and '.join(missing)} not set: export the first node's name and a "
            "free port before srun; torchrun and deepspeed do it by themselves"
        )
    import torch.distributed as dist

    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(days=7))
    try:
        yield dist.barrier
    finally:
        dist.destroy_process_group()


def choose_gpu(rank: int) -> None:
    """The GPU of this process, where there are some."""
    import torch

    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", rank)))
        torch.cuda.set_device(local % torch.cuda.device_count())


def spread(module: str, processes: int, **more: str) -> None:
    """Run `python -m module` side by side, each with its rank and `more` in its environment.

    The module calls `end_with_parent`. When one fails, the others are stopped, and ValueError is raised.
    """
    children = []
    for rank in range(processes):
        env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(processes), **more}
        command = [sys.executable, "-m", module]
        children.append(subprocess.Popen(command, env=env, stdin=subprocess.PIPE))
    try:
        while any(child.poll() is None for child in children):
            if any(child.poll() for child in children):
                break
            time.sleep(0.1)
    finally:
        for child in children:
            if child.poll() is None:
                child.terminate()
            child.wait()
            if child.stdin:
                child.stdin.close()
    failed = [child.returncode for child in children if child.returncode]
    if failed:
        raise ValueError(
            f"a process ended with status {failed[0]}; its message is above. The same command goes on"
        )


def end_with_parent() -> None:
    """For a process that `spread` started: it ends with the one that started it, however that ends."""

    def wait() -> None:
        while os.read(0, 1):  # its end is the parent's; sys.stdin has a lock that Python waits for at its end
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()

"""Several processes that share one job: which one this is, where they meet, which GPU is whose."""

from __future__ import annotations

import os
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

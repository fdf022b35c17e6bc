"""Functions run as the ranks of a real process group, over gloo on this machine."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import ProcessContext, start_processes

from tests.warm import METHOD, take_environment


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(
    ranks: int, folder: Path, call: Callable[..., Any], arguments: tuple, fresh: bool = False
) -> ProcessContext:
    """Start the ranks; see `in_ranks`."""
    folder.mkdir(parents=True, exist_ok=True)
    given = (ranks, free_port(), str(folder), dict(os.environ), call, arguments)
    method = "spawn" if fresh else METHOD
    started = start_processes(_rank, given, ranks, join=False, start_method=method)
    assert started
    return started


def _rank(
    rank: int,
    ranks: int,
    port: int,
    folder: str,
    env: dict[str, str],
    call: Callable[..., Any],
    arguments: tuple,
) -> None:
    import flamingo.registration  # noqa: F401 - what importing flamingo does, but in a command

    take_environment(env)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1",
    )  # fmt: skip
    torch.set_num_threads(1)
    from flamingo.train.engine import join_group, leave_group

    try:
        join_group()
        torch.save(call(*arguments), Path(folder) / f"{rank}.pt")
    except BaseException:
        (Path(folder) / f"{rank}.error").write_text(traceback.format_exc())
        raise
    finally:
        leave_group()


def in_ranks(
    ranks: int, folder: Path, call: Callable[..., Any], *arguments: Any, fresh: bool = False
) -> list[Any]:
    """What `call(*arguments)` gives on each of so many ranks; it must be importable.

    fresh: start Python anew, where that matters; else ranks begin with their imports done.
    """
    context = start(ranks, folder, call, arguments, fresh)
    try:
        while not context.join():
            pass
    except Exception:
        told = [path.read_text() for path in sorted(folder.glob("*.error"))]
        raise AssertionError("\n".join(told) or "a rank died") from None
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]

"""Functions run as the ranks of a real process group, over gloo on this machine."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank(rank: int, ranks: int, port: int, folder: str, call: Callable[..., Any], arguments: tuple) -> None:
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


def in_ranks(ranks: int, folder: Path, call: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `call(*arguments)` gives on each of so many ranks; it must be importable."""
    folder.mkdir(parents=True, exist_ok=True)
    context = torch.multiprocessing.start_processes(  # type: ignore[attr-defined]
        _rank, (ranks, free_port(), str(folder), call, arguments), ranks, join=False, start_method="spawn"
    )
    try:
        while not context.join():
            pass
    except Exception:
        told = [path.read_text() for path in sorted(folder.glob("*.error"))]
        raise AssertionError("\n".join(told) or "a rank died") from None
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]

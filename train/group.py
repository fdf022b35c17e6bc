"""Who am I among the ranks? From the environment of `torchrun`, `deepspeed` or `srun`.

The first two say it themselves: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT. Under
`srun` it follows from Slurm's variables. Without any of them a process is alone. What contradicts
itself is an error here, at once: a wrong rank would otherwise wait for others that never come.
"""

from __future__ import annotations

import itertools
import re
import socket
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple

FIRST_PORT, PORTS = 12000, 20000  # below the ports that Linux hands out to clients (32768 on)
NAMED = 5  # ranks that a message names
READ = timedelta(seconds=60)  # in which every rank has read why none goes on

Environment = Mapping[str, str]


class SharedError(ValueError):
    """All ranks fail with the same words, so one of them says it."""


class Member(NamedTuple):
    """One rank of a run. `launcher` is what its numbers were read from."""

    rank: int
    local_rank: int
    world: int
    master_addr: str
    master_port: int
    launcher: str


def member(environ: Environment, local_rank: int | None = None) -> Member:
    """This process among the ranks.

    Args:
        environ: of the process.
        local_rank: what the launcher gave as `--local_rank`, if it did.

    Raises:
        ValueError: variables that are missing, are no numbers, or contradict each other.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        found = _announced(environ, local_rank)
    elif "SLURM_PROCID" in environ:
        found = _slurm(environ)
    elif local_rank:
        raise ValueError(
            f"--local_rank={local_rank}, but RANK and WORLD_SIZE are not set: start with `flamingo train`, "
            "`deepspeed --module flamingo.train`, `torchrun -m flamingo.train` or `srun`"
        )
    else:
        found = Member(0, 0, 1, "127.0.0.1", 0, "alone")  # port 0: any that is free
    if not 0 <= found.rank < found.world:
        raise ValueError(
            f"rank {found.rank} of {found.world} ranks (from {found.launcher}): "
            "ranks count from 0 to the number of ranks less one"
        )
    return found


def announce(found: Member, environ: MutableMapping[str, str]) -> None:
    """Write it where torch.distributed and DeepSpeed look for it."""
    environ["RANK"], environ["WORLD_SIZE"] = str(found.rank), str(found.world)
    environ["LOCAL_RANK"] = str(found.local_rank)
    environ["MASTER_ADDR"], environ["MASTER_PORT"] = found.master_addr, str(found.master_port)


def check_device(found: Member, gpus: int) -> None:
    """This rank's GPU must be there. gpus: that this process sees.

    Raises ValueError; ranks without a GPU each would hang in the first collective.
    """
    if found.local_rank >= gpus:
        raise ValueError(
            f"local rank {found.local_rank} has no GPU: this process sees {gpus} "
            f"(from {found.launcher}). Start one process per GPU, and let each see all GPUs of its machine: "
            "CUDA_VISIBLE_DEVICES unset, and under Slurm --gpus-per-node instead of --gpus-per-task"
        )


def check_alike(found: Member, gpu: bool, store: Any) -> None:
    """All ranks must see a GPU, or none: they would seek each other in different ways, for hours.

    gpu: whether this process sees one; store: where the ranks meet. Raises SharedError, on all ranks.
    """
    store.set(f"gpu/{found.rank}", f"{int(gpu)} {socket.gethostname()}")
    if found.rank == 0:
        told = [store.get(f"gpu/{rank}").decode().split(" ", 1) for rank in range(found.world)]
        blind = [f"{rank} ({host})" for rank, (sees, host) in enumerate(told) if sees == "0"]
        more = f" and {len(blind) - NAMED} more" if len(blind) > NAMED else ""
        fault = f"ranks that see no GPU, while others do: {', '.join(blind[:NAMED])}{more}. Is the driver "
        fault += "there sound (nvidia-smi), and CUDA_VISIBLE_DEVICES alike? A run is on GPUs or on CPUs"
        store.set("gpu/verdict", fault if 0 < len(blind) < found.world else "alike")
    verdict = store.get("gpu/verdict").decode()
    if verdict == "alike":
        return
    store.set(f"gpu/read/{found.rank}", "")
    if found.rank == 0:
        # The store ends with this rank's process: then others would read that a connection was closed.
        with suppress(RuntimeError):  # one that died meanwhile will not read it
            store.wait([f"gpu/read/{rank}" for rank in range(found.world)], READ)
    raise SharedError(verdict)


def restarted(environ: Environment) -> bool:
    """Whether torchrun or Slurm started this run again, so that it should go on by itself."""
    return any(
        _number(environ, name, "0") > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    )


def hosts(nodes: str) -> list[str]:
    """Slurm's short form of a list of nodes, written out: node[01-02,7] -> node01, node02, node7.

    Raises ValueError for a list that is not one.
    """
    found = []
    for part in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", nodes):
        pieces = re.split(r"\[([^\[\]]*)\]", part)
        choices = [_range(piece) if i % 2 else [piece] for i, piece in enumerate(pieces)]
        found += ["".join(choice) for choice in itertools.product(*choices)]
    if not found or nodes.count("[") != nodes.count("]"):
        raise ValueError(f"{nodes!r} is not a list of nodes such as node[003-005,7],login1")
    return found


def _announced(environ: Environment, local_rank: int | None) -> Member:
    launcher = "deepspeed" if "CROSS_RANK" in environ else "RANK and WORLD_SIZE"
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environ else launcher
    # torch 2.14: its one store still holds the addresses of the ranks before the restart, so that the
    # new ones seek each other there in vain.
    shares = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if launcher == "torchrun" and shares and _number(environ, "TORCHELASTIC_MAX_RESTARTS", "0"):
        raise ValueError(
            "torchrun --max-restarts would start the ranks again and they would not find each other: "
            "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of torchrun"
        )
    rank, world = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    if "LOCAL_RANK" in environ and local_rank not in (None, _number(environ, "LOCAL_RANK")):
        raise ValueError(f"--local_rank={local_rank} contradicts LOCAL_RANK={environ['LOCAL_RANK']}")
    if "LOCAL_RANK" not in environ and local_rank is None and world > 1:
        raise ValueError(
            f"RANK={rank} of WORLD_SIZE={world} without LOCAL_RANK: set it to the number of the process on "
            "its machine, from 0"
        )
    local = _number(environ, "LOCAL_RANK", "0") if local_rank is None else local_rank
    task = environ.get("SLURM_PROCID", str(rank))
    tasks = environ.get("SLURM_STEP_NUM_TASKS")
    if launcher == "RANK and WORLD_SIZE" and 1 < world == int(tasks or 0) and task != str(rank):
        raise ValueError(
            f"RANK={rank} contradicts SLURM_PROCID={task}: leave RANK unset, srun numbers the ranks"
        )
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environ]
    if world > 1 and missing:
        raise ValueError(f"WORLD_SIZE={world} without {' and '.join(missing)}: where do the ranks meet?")
    address = environ.get("MASTER_ADDR", "127.0.0.1")
    return Member(rank, local, world, address, _number(environ, "MASTER_PORT", "0"), launcher)


def _slurm(environ: Environment) -> Member:
    """Inside a step of srun; the variables of its step go before those of its job."""
    world = _number(environ, "SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1"))
    if world > 1 and not {"SLURM_STEP_ID", "SLURM_STEPID"} & environ.keys():
        raise ValueError(
            f"SLURM_NTASKS={world}, but this process was not started by srun: write `srun` before the "
            "command, or set RANK=0 WORLD_SIZE=1 for one process alone"
        )
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    address = environ.get("MASTER_ADDR") or (hosts(nodes)[0] if nodes else "127.0.0.1")
    spread = _number(environ, "SLURM_JOB_ID", "0") * 7 + _number(environ, "SLURM_STEP_ID", "0")
    port = environ.get("MASTER_PORT") or str(FIRST_PORT + spread % PORTS)
    return Member(
        _number(environ, "SLURM_PROCID"),
        _number(environ, "SLURM_LOCALID"),
        world,
        address,
        _number({"MASTER_PORT": port}, "MASTER_PORT"),
        "srun",
    )


def _number(environ: Environment, name: str, default: str | None = None) -> int:
    value = environ.get(name, default)
    if value is None:
        raise ValueError(f"{name} is not set, although other variables of a launcher are")
    if not value.isdecimal():
        raise ValueError(f"{name}={value!r} is not a number")
    return int(value)


def _range(text: str) -> list[str]:
    """003-005,7 -> 003, 004, 005, 7."""
    found = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or int(last or first) < int(first):
            raise ValueError(f"[{text}] is not a range of nodes such as [003-005,7]")
        found += [f"{n:0{len(first)}d}" for n in range(int(first), int(last or first) + 1)]
    return found

"""Gradients added up over the ranks: where they lie, or in memory that the ranks of one machine share.

W ranks; N numbers of all gradients together.
"""

from __future__ import annotations

import mmap
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

JOINED = 1 << 18  # numbers of a gradient: smaller ones are sent together, each would wait for the network
PART = 1 << 21  # numbers of each rank that lie in shared memory at one time


class Exchange:
    """How the ranks of a run add up their gradients.

    near: without GPUs, ranks that one launcher started on one machine meet in its memory, which takes
    half the time of gloo's sockets (docs/decisions.md). Others, and those that cannot, send.
    """

    def __init__(self, near: bool):
        self.near = near
        self.memory: Tensor | None = None

    def add_up(self, parameters: Iterable[nn.Parameter]) -> None:
        """`grad` of each becomes its sum over all ranks, the same on all of them.

        All ranks must give their parameters in the same order; one without a gradient adds zeros.
        """
        gradients = [_gradient(parameter) for parameter in parameters]
        if self.near and self.memory is None:
            self.memory = shared(min(PART, sum(g.numel() for g in gradients)))
            self.near = self.memory is not None
        if self.memory is not None:
            _meet(gradients, self.memory)
        else:
            _send(gradients)


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _send(gradients: Sequence[Tensor]) -> None:
    """Large ones are not copied."""
    small = [g for g in gradients if g.numel() < JOINED]
    large = [g for g in gradients if g.numel() >= JOINED]
    joined = [torch.cat([g.flatten() for g in small])] if small else []
    for work in [dist.all_reduce(tensor, async_op=True) for tensor in (*large, *joined)]:
        work.wait()  # type: ignore[union-attr]
    for whole in joined:
        for part, gradient in zip(whole.split([g.numel() for g in small]), small, strict=True):
            gradient.copy_(part.view_as(gradient))


def _meet(gradients: Sequence[Tensor], memory: Tensor) -> None:
    """memory: float32[W + 1, size], of all ranks; the last row is for sums, of which each rank makes a
    share."""
    rank, world, size = dist.get_rank(), dist.get_world_size(), memory.shape[1]
    for pieces in _cut([gradient.view(-1) for gradient in gradients], size):
        held = sum(piece.numel() for piece in pieces)
        torch.cat(pieces, out=memory[rank, :held])
        dist.barrier()  # all have laid down theirs
        mine = slice(held * rank // world, held * (rank + 1) // world)
        total = torch.add(memory[0, mine], memory[1, mine], out=memory[world, mine])
        for other in memory[2:world, mine]:
            total += other
        dist.barrier()  # all sums are there; nobody writes over them before all are at the next barrier
        sums = memory[world, :held].split([piece.numel() for piece in pieces])
        torch._foreach_copy_(pieces, sums)  # type: ignore[attr-defined]


def _cut(tensors: Iterable[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Views of flat tensors, so many as hold `size` numbers together; the last ones hold what is left."""
    pieces: list[Tensor] = []
    room = size
    for tensor in tensors:
        while tensor.numel():
            pieces.append(tensor[:room])
            tensor, room = tensor[room:], room - pieces[-1].numel()
            if not room:
                yield pieces
                pieces, room = [], size
    if pieces:
        yield pieces


def shared(size: int) -> Tensor | None:
    """float32[W + 1, size] that all ranks read and write; None on all where one cannot.

    It has no name: whatever ends the ranks, nothing is left of it. All ranks must call this.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    length = 4 * (world + 1) * size
    made = _make(length) if rank == 0 else None
    told = [made]
    dist.broadcast_object_list(told, src=0)
    memory = _map(told[0], length) if os.environ.get("LOCAL_RANK") == str(rank) else None
    seen: list[bool] = [False] * world
    dist.all_gather_object(seen, memory is not None)
    if made is not None:
        os.close(made[1])
    return torch.frombuffer(memory, dtype=torch.float32).view(world + 1, size) if all(seen) else None


def _make(length: int) -> tuple[int, int, bytes] | None:
    """Memory of so many bytes as (process, its descriptor, what lies at its beginning); None where there
    is none to be had."""
    token = secrets.token_bytes(8)
    try:
        file = os.memfd_create("gradients")
    except (AttributeError, OSError):  # a system without it
        return None
    try:
        os.posix_fallocate(file, 0, length)  # too little memory is an error here; later it would be a signal
        os.pwrite(file, token, 0)
    except OSError:
        os.close(file)
        return None
    return os.getpid(), file, token


def _map(made: tuple[int, int, bytes] | None, length: int) -> mmap.mmap | None:
    """What another process made, if this one may see it."""
    if made is None:
        return None
    process, number, token = made
    try:
        # A process of another machine with the same number may have anything there: do not wait for it.
        file = os.open(f"/proc/{process}/fd/{number}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        memory = mmap.mmap(file, length)
    except (OSError, ValueError):
        return None
    finally:
        os.close(file)
    return memory if memory[: len(token)] == token else None

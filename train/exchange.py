"""Gradients added up over the ranks: where they lie, or in memory that the ranks of one machine share.

W ranks; N numbers of all gradients together.
"""

from __future__ import annotations

import mmap
import os
import secrets
from bisect import bisect
from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor, nn

JOINED = 1 << 18  # numbers of a gradient: smaller ones are sent together, each would wait for the network


class Exchange:
    """How the ranks of a run add up their gradients.

    near: without GPUs, ranks that one launcher started on one machine meet in its memory, which takes
    less than half the time of gloo's sockets (docs/decisions.md). Others, and those that cannot, send.

    Attributes:
        mine: parameters of which this rank reads the norm, and clips the gradient: all, where each rank
            has gradients of its own. Where `memory` is shared the gradients are the same tensors on all
            ranks, and every parameter is one rank's.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], near: bool):
        """parameters: the same, in the same order, on all ranks."""
        self.parameters = list(parameters)
        self.mine = self.parameters
        self.near = near
        self.memory: Tensor | None = None  # float32[W, N], a row for each rank
        self._cuts: list[int] = []  # rank r adds up the numbers from its cut to the next
        self._sums: list[Tensor] = []  # where those of each parameter then lie

    def add_up(self) -> None:
        """`grad` of each becomes its sum over all ranks, the same on all of them; none counts as zeros.

        In shared memory they are good until `wait`, after which no rank may read them any more.
        """
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.near and self.memory is None:
            self.memory = shared(sum(parameter.numel() for parameter in self.parameters))
            self.near = self.memory is not None
            if self.memory is not None:
                self._divide(self.memory)
        gradients: list[Tensor] = [parameter.grad for parameter in self.parameters]  # type: ignore[misc]
        if self.memory is not None:
            self._meet(self.memory, gradients)
        else:
            _send(gradients)

    def wait(self) -> None:
        """Until no rank reads or writes sums in shared memory; nothing where there are none."""
        if self.memory is not None:
            dist.barrier()

    def _divide(self, memory: Tensor) -> None:
        """Parameters in their order to ranks, about as many numbers to each."""
        rank, (world, size) = dist.get_rank(), memory.shape
        ends = [0, *accumulate(parameter.numel() for parameter in self.parameters)]
        inner = [bisect(ends, size * r / world, hi=len(ends) - 1) - 1 for r in range(1, world)]
        firsts = [0, *inner, len(self.parameters)]
        self._cuts = [ends[first] for first in firsts]
        self.mine = self.parameters[firsts[rank] : firsts[rank + 1]]
        for number, parameter in enumerate(self.parameters):
            owner = bisect(firsts, number, hi=world) - 1
            self._sums.append(memory[owner, ends[number] : ends[number + 1]].view_as(parameter))

    def _meet(self, memory: Tensor, gradients: Sequence[Tensor]) -> None:
        rank = dist.get_rank()
        torch.cat([gradient.view(-1) for gradient in gradients], out=memory[rank])
        self.wait()  # all have laid down theirs
        share = memory[:, self._cuts[rank] : self._cuts[rank + 1]]
        for other, numbers in enumerate(share):
            if other != rank:
                share[rank] += numbers
        self.wait()  # all sums are there
        for parameter, total in zip(self.parameters, self._sums, strict=True):
            parameter.grad = total


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


def shared(size: int) -> Tensor | None:
    """float32[W, size] that all ranks read and write; None on all where one cannot.

    It has no name: whatever ends the ranks, nothing is left of it. All ranks must call this.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    length = 4 * world * size
    made = _make(length) if rank == 0 else None
    told = [made]
    dist.broadcast_object_list(told, src=0)
    memory = _map(told[0], length) if os.environ.get("LOCAL_RANK") == str(rank) else None
    seen: list[bool] = [False] * world
    dist.all_gather_object(seen, memory is not None)
    if made is not None:
        os.close(made[1])
    return torch.frombuffer(memory, dtype=torch.float32).view(world, size) if all(seen) else None


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

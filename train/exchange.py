"""Gradients added up over the ranks where they lie: the large ones are not copied."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

JOINED = 1 << 18  # numbers of a gradient: smaller ones are sent together, each would wait for the network


def add_up(parameters: Iterable[nn.Parameter]) -> None:
    """`grad` of each becomes its sum over all ranks, the same on all of them.

    All ranks must give their parameters in the same order; one without a gradient adds zeros.
    """
    gradients = [_gradient(parameter) for parameter in parameters]
    small = [g for g in gradients if g.numel() < JOINED]
    large = [g for g in gradients if g.numel() >= JOINED]
    joined = [torch.cat([g.flatten() for g in small])] if small else []
    for work in [dist.all_reduce(tensor, async_op=True) for tensor in (*large, *joined)]:
        work.wait()  # type: ignore[union-attr]
    for whole in joined:
        for part, gradient in zip(whole.split([g.numel() for g in small]), small, strict=True):
            gradient.copy_(part.view_as(gradient))


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad

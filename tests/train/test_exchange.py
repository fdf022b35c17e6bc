"""Gradients are added up over ranks, large ones where they lie."""

from __future__ import annotations

import torch
from torch import nn

from flamingo.train import exchange
from tests.train.ranks import in_ranks

SHAPES = [(3,), (512, exchange.JOINED // 512), (4, 5), (exchange.JOINED + 1,)]


def gradient(rank: int, number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * rank + number)
    return torch.randn(SHAPES[number], generator=generator)


def added_up() -> tuple[list[torch.Tensor], list[bool]]:
    """This rank's sums, and whether each lies where its gradient lay; rank 1 has no gradient 0 and 1."""
    rank = torch.distributed.get_rank()
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    for number, parameter in enumerate(parameters):
        if (rank, number) not in ((1, 0), (1, 1)):
            parameter.grad = gradient(rank, number)
    before = [p.grad.data_ptr() if p.grad is not None else None for p in parameters]
    exchange.add_up(parameters)
    found = [p.grad for p in parameters]
    assert all(grad is not None for grad in found)
    return found, [grad.data_ptr() == old for grad, old in zip(found, before, strict=True)]  # type: ignore[union-attr]


def test_every_rank_has_the_sum_of_all_ranks_and_one_without_a_gradient_adds_nothing(tmp_path):
    ranks = in_ranks(3, tmp_path, added_up)
    for found, _ in ranks:
        for number, total in enumerate(found):
            given = [gradient(r, number) for r in range(3) if (r, number) not in ((1, 0), (1, 1))]
            torch.testing.assert_close(total, sum(given), atol=1e-6, rtol=0)
            assert torch.equal(total, ranks[0][0][number]), "the same bits on all ranks"
    assert all(ranks[0][1]) and ranks[1][1] == [False, False, True, True]

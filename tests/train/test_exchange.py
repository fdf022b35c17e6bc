"""Gradients are added up over ranks, large ones where they lie."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from flamingo.train import exchange
from tests.train import steps
from tests.train.ranks import in_ranks

SHAPES = [(3,), (512, exchange.JOINED // 512), (4, 5), (exchange.JOINED + 1,)]
ABSENT = {(1, 0), (1, 1)}  # (rank, number) without a gradient


@contextmanager
def sent() -> Iterator[list[Tensor]]:
    """The tensors that this rank adds up over ranks meanwhile."""
    found: list[Tensor] = []
    send = torch.distributed.all_reduce

    def noted(tensor: Tensor, *given, **named):
        found.append(tensor)
        return send(tensor, *given, **named)

    with patch("torch.distributed.all_reduce", noted):
        yield found


def gradient(rank: int, number: int) -> Tensor | None:
    generator = torch.Generator().manual_seed(10 * rank + number)
    return None if (rank, number) in ABSENT else torch.randn(SHAPES[number], generator=generator)


def added_up() -> tuple[list[Tensor], list[list[int]]]:
    """This rank's sums, and the shapes that were sent; large gradients are sent themselves."""
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    for number, parameter in enumerate(parameters):
        parameter.grad = gradient(torch.distributed.get_rank(), number)
    before = [parameter.grad for parameter in parameters]
    with sent() as tensors:
        exchange.add_up(parameters)
    found = [parameter.grad for parameter in parameters if parameter.grad is not None]
    assert all(old is None or new is old for new, old in zip(found, before, strict=True))
    assert all(any(found[number] is tensor for tensor in tensors) for number in (1, 3))
    return found, [list(tensor.shape) for tensor in tensors]


def test_every_rank_has_the_sum_of_all_ranks_and_one_without_a_gradient_adds_nothing(tmp_path):
    ranks = in_ranks(3, tmp_path, added_up)
    for found, shapes in ranks:
        assert shapes == [list(SHAPES[1]), list(SHAPES[3]), [3 + 4 * 5]]  # the small ones joined
        for number, total in enumerate(found):
            given = [grad for rank in range(3) if (grad := gradient(rank, number)) is not None]
            torch.testing.assert_close(total, sum(given), atol=1e-6, rtol=0)
            assert torch.equal(total, ranks[0][0][number]), "the same bits on all ranks"


def numbers_sent(fields: dict) -> int:
    """By the backward pass of one step."""
    given = steps.recipe(**fields)
    engine = steps.engine_of(given)
    (_, rows), *_ = steps.micro_batches(0, 0, 1, 1, 0)
    loss, _ = engine(rows, dict.fromkeys(steps.WEIGHTS, 100))
    with sent() as tensors:
        engine.backward(loss)
    return sum(tensor.numel() for tensor in tensors)


@pytest.mark.parametrize(
    ("fields", "exchanges"), [({}, False), ({"deepspeed": {"memory_breakdown": False}}, True)]
)
def test_a_rank_alone_sends_no_gradients_unless_a_section_of_deepspeed_may_say_how(
    fields, exchanges, tmp_path
):
    assert bool(in_ranks(1, tmp_path, numbers_sent, fields)[0]) == exchanges

"""Gradients are added up over ranks: large ones where they lie, or all in memory that ranks share."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
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


def with_gradients(numbers: Sequence[int] = range(len(SHAPES))) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros(SHAPES[number])) for number in numbers]
    give_gradients(parameters, numbers)
    return parameters


def give_gradients(parameters: list[nn.Parameter], numbers: Sequence[int]) -> None:
    for number, parameter in zip(numbers, parameters, strict=True):
        parameter.grad = gradient(torch.distributed.get_rank(), number)


def added_up(near: bool, numbers: Sequence[int]) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """This rank's sums, of two exchanges one after the other, what was sent in the first, and which of the
    parameters are this rank's."""
    parameters = with_gradients(numbers)
    before = [parameter.grad for parameter in parameters]
    meeting = exchange.Exchange(parameters, near)
    with sent() as tensors:
        meeting.add_up()
    sums = [parameter.grad for parameter in parameters if parameter.grad is not None]
    found = [total.clone() for total in sums]
    meeting.wait()
    assert (meeting.memory is not None) == near
    if not near:
        assert all(old is None or new is old for new, old in zip(sums, before, strict=True))
        assert all(any(sums[number] is tensor for tensor in tensors) for number in (1, 3))
    give_gradients(parameters, numbers)
    meeting.add_up()
    assert all(torch.equal(one.grad, two) for one, two in zip(parameters, found, strict=True))  # type: ignore[arg-type]
    meeting.wait()
    mine = {id(parameter) for parameter in meeting.mine}
    return found, tensors, [number for number, p in zip(numbers, parameters, strict=True) if id(p) in mine]


def check_sums(ranks: list[list[Tensor]], numbers: Sequence[int] = range(len(SHAPES))) -> None:
    for found in ranks:
        for place, (number, total) in enumerate(zip(numbers, found, strict=True)):
            given = [grad for rank in range(len(ranks)) if (grad := gradient(rank, number)) is not None]
            torch.testing.assert_close(total, sum(given), atol=1e-6, rtol=0)
            assert torch.equal(total, ranks[0][place]), "the same bits on all ranks"


def test_every_rank_has_the_sum_of_all_ranks_and_one_without_a_gradient_adds_nothing(tmp_path):
    ranks = in_ranks(3, tmp_path, added_up, False, range(len(SHAPES)))
    check_sums([found for found, _, _ in ranks])
    for _, tensors, mine in ranks:
        joined = [3 + 4 * 5]  # the small ones
        assert [list(tensor.shape) for tensor in tensors] == [list(SHAPES[1]), list(SHAPES[3]), joined]
        assert mine == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("numbers", "shares"),
    [
        ([0, 1, 2, 3], [[0], [1, 2], [3]]),
        ([3, 1, 0, 2], [[], [3], [1, 0, 2]]),
        ([1], [[], [], [1]]),  # fewer than ranks
    ],
)
def test_in_shared_memory_nothing_is_sent_and_each_parameter_is_one_rank_s(numbers, shares, tmp_path):
    ranks = in_ranks(3, tmp_path, added_up, True, numbers)
    check_sums([found for found, _, _ in ranks], numbers)
    assert [tensors for _, tensors, _ in ranks] == [[], [], []]
    assert [mine for _, _, mine in ranks] == shares


def traces(exchanges: int) -> tuple[list[str], list[str]]:
    """Descriptors of shared memory that this rank holds after so many exchanges, and what it sees of it."""
    parameters = with_gradients()
    meeting = exchange.Exchange(parameters, near=True)
    for _ in range(exchanges):
        give_gradients(parameters, range(len(SHAPES)))
        meeting.add_up()
        meeting.wait()
    names = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    maps = Path("/proc/self/maps").read_text().splitlines()
    return [name for name in names if "gradients" in name], [line for line in maps if "gradients" in line]


def test_shared_memory_is_made_once_and_has_no_name_so_that_nothing_outlives_the_ranks(tmp_path):
    for held, seen in in_ranks(2, tmp_path, traces, 3):
        assert held == ["/memfd:gradients (deleted)"]  # mmap's own descriptor
        assert len(seen) == 1


def apart(reason: str) -> tuple[list[Tensor], int]:
    """Sums of ranks of which one cannot see the memory of the first, and how many tensors were sent."""
    rank = torch.distributed.get_rank()
    if reason == "another node" and rank == 1:
        os.environ["LOCAL_RANK"] = "0"
    hidden = {"no such system": "memfd_create", "no memory": "posix_fallocate", "another user": "open"}
    whose = 0 if reason in ("no such system", "no memory") else 1
    call = patch.object(os, hidden.get(reason, "getpid"), side_effect=OSError("not here"))
    parameters = with_gradients()
    meeting = exchange.Exchange(parameters, near=True)
    with sent() as tensors:
        if reason in hidden and rank == whose:
            with call:
                meeting.add_up()
        else:
            meeting.add_up()
    assert meeting.memory is None and not meeting.near
    return [parameter.grad for parameter in parameters if parameter.grad is not None], len(tensors)


@pytest.mark.parametrize("reason", ["another node", "no such system", "no memory", "another user"])
def test_where_one_rank_cannot_share_memory_all_send(reason, tmp_path):
    ranks = in_ranks(2, tmp_path, apart, reason)
    check_sums([found for found, _ in ranks])
    assert [count for _, count in ranks] == [3, 3]


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


def numbers_sent_by_one_of_two(nodes: int) -> int:
    if nodes == 2:
        os.environ["LOCAL_RANK"] = "0"
    return numbers_sent({})


@pytest.mark.parametrize("nodes", [1, 2])
def test_two_ranks_send_gradients_only_if_they_are_two_nodes(nodes, tmp_path):
    ranks = in_ranks(2, tmp_path, numbers_sent_by_one_of_two, nodes)
    assert [bool(count) for count in ranks] == [nodes == 2] * 2


@contextmanager
def late(owner_and_name: tuple[Any, str]) -> Iterator[None]:
    """Meanwhile this call takes half a second more."""
    owner, name = owner_and_name
    call = getattr(owner, name)

    def slow(*given: Any, **named: Any) -> Any:
        time.sleep(0.5)
        return call(*given, **named)

    with patch.object(owner, name, slow):
        yield


CLIPPED = {"lr": 1e-2, "warmup_steps": 0, "clip": 0.01}
LATE: dict[str, tuple[Any, str]] = {
    "laying down": (torch, "cat"),
    "adding up": (Tensor, "__iadd__"),
    "clipping": (torch, "_foreach_mul_"),
    "the update": (torch.optim.AdamW, "step"),
}


def two_steps(late_in: str) -> list[dict[str, Tensor]]:
    """Gradients of each, and the weights in the end, of ranks that meet nowhere but in the engine; the second
    is late in one thing that it does."""
    rank, given = torch.distributed.get_rank(), steps.recipe(optimizer=CLIPPED)
    engine, found = steps.engine_of(given), []
    for step in range(2):
        ((_, rows),) = steps.micro_batches(step, rank, 2, 1, 0)
        loss, _ = engine(rows, dict.fromkeys(steps.WEIGHTS, 100))
        with late(LATE[late_in]) if late_in and rank == 1 else nullcontext():
            engine.backward(loss)
            found.append(steps.gradients(engine))
            engine.update(1e-2)
    assert engine.exchange.memory is not None
    return [*found, steps.weights(engine)]


@pytest.fixture(scope="module")
def in_time(tmp_path_factory) -> list[dict[str, Tensor]]:
    return in_ranks(2, tmp_path_factory.mktemp("in-time"), two_steps, "")[0]


@pytest.mark.parametrize("what", LATE)
def test_a_rank_that_is_late_in_shared_memory_is_waited_for(what, in_time, tmp_path):
    for found in in_ranks(2, tmp_path, two_steps, what):
        for one, other in zip(found, in_time, strict=True):
            assert all(torch.equal(value, other[name]) for name, value in one.items())

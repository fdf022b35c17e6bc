"""docs/scaling.md says what the functions compute, and they compute what collectives send."""

from __future__ import annotations

from pathlib import Path

import pytest

from flamingo.train.scaling import Machine, Work, limits, openflamingo_9b, row, sent, sizes, table

PAGE = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()


@pytest.fixture(scope="module")
def work() -> Work:
    return openflamingo_9b()


def test_the_tables_of_the_page_are_those_of_the_functions(work):
    machine = Machine()
    for lines in (sizes(work, machine), table(work, machine, True), table(work, machine, False)):
        assert "\n".join(lines) in PAGE
    assert f"P trained parameters: {work.trained:,}," in PAGE
    assert f"frozen weights in bfloat16: {work.frozen:,}, E = {work.encoder:,} of them the encoder's" in PAGE
    assert f"{work.flops:.3g} FLOPs" in PAGE


def test_where_it_stops_is_said_as_computed(work):
    found = limits(work, Machine())
    words = " ".join(PAGE.split())
    assert f"at {found[0]:,} GPUs with ZeRO-0, {found[1]:,} with ZeRO-1 and 2" in words
    assert found[1] == found[2] and f"as the computation at {found[3]:,} GPUs already" in words
    slow = row(work, 1, 1024, True, Machine(between=25e9 / 8))
    assert slow.efficiency[0] < 0.5  # the page's slow network
    first = row(work, 0, 1024, True, Machine())
    still = row(work, 0, 1024, True, Machine(hop=0))
    assert 0.02 < 1 - still.talk / first.talk < 0.05  # the page's hops


def test_what_is_trained_is_the_published_size_without_the_table_of_tokens(work):
    """5.5 GB in float32 with MPT's 50,434 rows of 4,096; here only the rows of the added tokens."""
    published = 4 * (work.trained + 50_434 * 4096)
    assert published == pytest.approx(5.5e9, rel=0.01)


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_a_rank_sends_what_a_ring_does(work, ranks):
    """All-reduce in a ring: N - 1 chunks of x / N to reduce, and as many to hand round."""
    gradients = 4 * work.trained
    chunks = [gradients / ranks] * (ranks - 1)
    assert sent(work, 0, ranks, 1)[0] == pytest.approx(2 * sum(chunks))
    assert sent(work, 0, ranks, 4) == sent(work, 0, ranks, 1)
    assert sent(work, 1, ranks, 4)[0] == pytest.approx(3 * sum(chunks))
    assert sent(work, 2, ranks, 4)[0] == pytest.approx(9 * sum(chunks))
    weights = [(work.frozen - work.encoder + gradients) / ranks] * (ranks - 1)
    assert sent(work, 3, ranks, 2)[0] == pytest.approx(2 * (3 * sum(weights) + sum(chunks)))


def test_a_batch_that_grows_keeps_the_work_of_a_rank_and_one_that_does_not_halves_it(work):
    def compute(gpus: int, grows: bool) -> float:
        return row(work, 0, gpus, grows, Machine()).compute

    assert compute(8, True) == compute(1024, True) == compute(64, False)
    assert compute(128, False) == pytest.approx(compute(64, False) / 2)

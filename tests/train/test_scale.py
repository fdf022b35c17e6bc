"""Who reads what, for 1,024 ranks with 8 loader processes each over 100,000 shards, by simulation.

Nothing is read: `Order` and `part_of_step` are all that decides it, and they are what training uses.
"""

from __future__ import annotations

import tracemalloc
from collections import Counter

import numpy as np
import pytest
from torch.utils.data import Dataset

from flamingo.data.steps import part_of_step, step_loader
from flamingo.data.stream import Order

RANKS, WORKERS, SHARDS, WINDOW = 1024, 8, 100_000, 16
PER_RANK = 4  # samples a step
BATCH = RANKS * PER_RANK


def counts(mean: int, seed: int = 0) -> np.ndarray:
    """Samples per shard, from a half to one and a half times the mean."""
    return np.random.default_rng(seed).integers(mean // 2, mean + mean // 2 + 1, SHARDS)


def order(mean: int) -> Order:
    return Order(counts(mean), WINDOW, 0, "manifest")


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_the_parts_of_a_step_are_its_positions_without_a_gap_or_a_duplicate(accumulation):
    parts = RANKS * accumulation
    for step in (0, 1, 10**9):
        every = [p for part in range(parts) for p in part_of_step(step, BATCH, part, parts)]
        assert every == list(range(step * BATCH, (step + 1) * BATCH))


def test_a_billion_samples_are_placed_without_a_duplicate_over_steps_of_all_ranks():
    billion = order(mean=10_000)
    assert billion.samples > 9e8
    # The first steps, and those that lie across the end of the first epoch.
    last = billion.samples // BATCH
    for steps in (range(8), range(last - 2, last + 3)):
        places = [billion.locate(p) for step in steps for p in range(step * BATCH, (step + 1) * BATCH)]
        assert len(set(places)) == len(steps) * BATCH
        for _, shard, sample in places:
            assert 0 <= sample < billion.counts[shard]
    assert {place.epoch for place in places} == {0, 1}


def test_an_epoch_over_all_shards_gives_every_sample_once():
    """Two samples a shard on average, so that a whole epoch is quickly gone through."""
    small = order(mean=2)
    seen = np.zeros(small.samples, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(small.counts)])
    for position in range(small.samples):
        epoch, shard, sample = small.locate(position)
        assert epoch == 0
        seen[starts[shard] + sample] += 1
    assert (seen == 1).all()


def test_any_rank_finds_its_place_at_once_and_in_bounded_memory():
    """What one loader process holds: two orders of shards and two windows, whatever the position."""
    tracemalloc.start()
    billion = order(mean=10_000)
    for step in (0, 1000, 10**6, 10**9):  # far apart: nothing is counted through
        for rank in (0, RANKS - 1):
            for position in part_of_step(step, BATCH, rank, RANKS):
                billion.locate(position)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 8 << 20 and peak < 24 << 20


def test_the_shards_in_use_at_once_are_those_of_a_window_whatever_the_number_of_ranks():
    billion = order(mean=10_000)
    for step in (0, 12_345):
        used = {billion.locate(p).shard for p in range(step * BATCH, (step + 1) * BATCH)}
        assert len(used) <= 2 * WINDOW


class Steps(Dataset):
    """What `StepDataset` gives, but positions in place of batches."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __getitem__(self, step: int) -> tuple[int, list[int]]:
        from torch.utils.data import get_worker_info

        worker = get_worker_info()
        return worker.id if worker else -1, list(part_of_step(step, BATCH, self.rank, RANKS))


@pytest.mark.parametrize("start", [0, 5], ids=["from the start", "resumed"])
def test_eight_loader_processes_share_the_steps_of_a_rank_and_keep_their_order(start):
    rank, steps = 777, 3 * WORKERS
    got = list(step_loader(Steps(rank), start, start + steps, WORKERS))  # type: ignore[arg-type]
    expected = [list(part_of_step(step, BATCH, rank, RANKS)) for step in range(start, start + steps)]
    assert [positions for _, positions in got] == expected  # type: ignore[misc]
    assert Counter(worker for worker, _ in got) == dict.fromkeys(range(WORKERS), 3)  # type: ignore

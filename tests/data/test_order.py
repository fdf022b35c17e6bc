"""The order of samples is a function of position, whatever reads it."""

from __future__ import annotations

import hashlib
import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from flamingo.data.config import Augment, SourceConfig
from flamingo.data.document import Text
from flamingo.data.errors import TooManyBadSamples
from flamingo.data.steps import Feed, StepDataset, open_feeds, step_loader
from flamingo.data.stream import Order, Stream, permutation


def caption(stream: Stream, position: int) -> str:
    text = stream[position].items[-1]
    assert isinstance(text, Text)
    return text.text


@pytest.fixture
def feeds(source, tokenizer, transform) -> list[Feed]:
    changes = {"augment": Augment(crop_scale=(0.2, 1.0), flip=0.5), "crop": "random", "max_tokens": 2}
    other = source.model_copy(update={"name": "other", "batch": 48, "window": 1, "p_next": 0.5, **changes})
    return open_feeds(
        [source, other],
        seed=7,
        tokenizer=tokenizer,
        transform=transform,
        image_token_id=1,
        end_of_chunk_id=2,
    )


def global_batches(feeds: list[Feed], steps: range, ranks: int, parts: int, workers: int):
    """What all ranks together train on, per step and source: keys, tokens and first pixels."""
    loaders: list[Iterator] = [
        step_loader(StepDataset(feeds, rank, ranks, parts), steps.start, steps.stop, workers)
        for rank in range(ranks)
    ]
    for by_rank in zip(*loaders, strict=True):
        yield {
            feed.name: [
                (key, row[mask.bool()].tolist(), pixels[0, 0, 0].item(), image, ahead)
                for batches in by_rank
                for batch in batches[feed.name]
                for key, row, mask, pixels, image, ahead in zip(
                    batch.keys, batch.input_ids, batch.attention_mask, batch.pixel_values, batch.image_keys,
                    [False] * len(batch.keys) if batch.look_ahead is None else batch.look_ahead.tolist(),
                    strict=True,
                )
            ]
            for feed in feeds
        }  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("parts", [1, 2])
def test_global_batches_are_the_same_for_any_ranks_and_accumulation(feeds, ranks, parts):
    expected = list(global_batches(feeds, range(5), 1, 1, 0))
    assert list(global_batches(feeds, range(5), ranks, parts, 0)) == expected


@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_resuming_at_any_step_continues_the_same_order(feeds, cut):
    expected = list(global_batches(feeds, range(5), 1, 1, 0))
    assert list(global_batches(feeds, range(cut, 5), 2, 1, 0)) == expected[cut:]


def test_worker_processes_do_not_change_the_order_nor_the_trainers_random_numbers(feeds):
    expected = list(global_batches(feeds, range(4), 1, 1, 0))
    before = torch.get_rng_state()
    assert list(global_batches(feeds, range(4), 1, 2, 2)) == expected
    assert torch.equal(torch.get_rng_state(), before)


def test_a_dataset_that_was_pickled_reads_the_same(feeds):
    dataset = StepDataset(feeds)
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy[3]["other"][0].keys == dataset[3]["other"][0].keys


def test_a_batch_that_ranks_and_accumulation_do_not_divide_names_the_numbers(feeds):
    with pytest.raises(ValueError, match=r"'pairs'.*24.*2 ranks.*8 = 16.*`batch` to 16 or 32"):
        StepDataset(feeds, ranks=2, accumulation=8)


def test_each_sample_comes_once_per_epoch_and_epochs_differ(source):
    stream = Stream(source, seed=0)
    n = stream.order.samples
    epochs = [[caption(stream, e * n + i) for i in range(n)] for e in range(3)]
    assert n == 24
    assert all(sorted(epoch) == sorted(f"sample {i}" for i in range(24)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_another_seed_is_another_order_and_moved_shards_are_the_same(source, tmp_path):
    order = [caption(Stream(source, seed=0), i) for i in range(24)]
    assert [caption(Stream(source, seed=1), i) for i in range(24)] != order
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in tmp_path.glob("*.tar"):
        (moved / path.name).write_bytes(path.read_bytes())
    copy = source.model_copy(update={"shards": str(moved / "*.tar")})
    assert [caption(Stream(copy, seed=0), i) for i in range(24)] == order


def test_only_the_shards_of_one_window_are_in_use_at_a_time():
    counts = [10] * 12
    order = Order(counts, 3, 0)
    for window in range(4):
        places = [order.locate(position) for position in range(window * 30, window * 30 + 30)]
        assert len({place.shard for place in places}) == 3
        assert len({(place.shard, place.sample) for place in places}) == 30


def test_order_holds_for_any_counts_and_windows():
    random = np.random.default_rng(0)
    for _ in range(50):
        counts = random.integers(0, 6, size=random.integers(1, 9))
        counts[0] += 1
        order = Order(counts, int(random.integers(1, 10)), "x")
        everything = {(s, i) for s, count in enumerate(counts) for i in range(count)}
        n = order.samples
        for epoch in range(2):
            places = [order.locate(epoch * n + i) for i in range(n)]
            assert {place.epoch for place in places} == {epoch}
            assert len(places) == len(everything)
            assert {(p.shard, p.sample) for p in places} == everything


def test_p_next_is_the_share_of_documents_that_look_ahead(source):
    for share in (0.0, 0.3, 1.0):
        stream = Stream(source.model_copy(update={"p_next": share}), seed=3)
        found = sum(stream.looks_ahead(position) for position in range(2000)) / 2000
        assert found == pytest.approx(share, abs=0.05 if 0 < share < 1 else 0)


def test_the_shuffle_is_uniform():
    counts = Counter(tuple(permutation(3, "trial", i).tolist()) for i in range(6000))
    assert len(counts) == 6
    assert all(880 < count < 1120 for count in counts.values())  # 1000 +- 4 deviations
    assert permutation(0, 1).tolist() == []
    assert permutation(1, 1).tolist() == [0]


def test_samples_of_a_window_come_in_any_order_and_windows_hold_any_shards():
    """Uniformly: each of 6 samples comes first as often, beside each other one, as does each shard."""
    firsts, seconds, windows = Counter(), Counter(), Counter()
    for epoch in range(3000):
        order = Order([1, 2, 3], 3, "t", epoch)
        places = [order.locate(position)[1:] for position in range(2)]
        firsts[places[0]] += 1
        seconds[places[1]] += 1
        later = Order([2, 2, 2, 2], 2, "t").locate(8 * epoch)
        windows[frozenset(Order([2, 2, 2, 2], 2, "t").shards_of(2 * epoch))] += 1
        assert later.epoch == epoch
    for counts, kinds in ((firsts, 6), (seconds, 6), (windows, 6)):
        assert len(counts) == kinds
        assert all(abs(count - 500) < 90 for count in counts.values())  # 4 deviations


def test_the_shuffle_never_changes():
    # A release that changes these numbers breaks the resumption of every run.
    assert permutation(8, 0, "a").tolist() == [6, 7, 3, 2, 1, 5, 0, 4]
    longer = permutation(1000, 1, "b").astype("<i8").tobytes()
    assert hashlib.sha256(longer).hexdigest().startswith("00f72525cbe0f5fb")


def break_samples(shards: Path, *numbers: int) -> None:
    """Damage the pictures of these samples where they lie."""
    for path in shards.glob("s-*.tar"):
        data = bytearray(path.read_bytes())
        for number in numbers:
            start = data.find(f"{number:04d}.png".encode())
            if start >= 0:
                data[start + 512 : start + 520] = b"garbage!"
        path.write_bytes(data)


def test_a_bad_sample_is_replaced_by_the_same_one_for_every_reader(feeds, source, tmp_path, caplog):
    good = [caption(Stream(source, seed=7), i) for i in range(24)]
    break_samples(tmp_path, 3, 17)
    stream = Stream(source, seed=7)
    order = [caption(stream, i) for i in range(24)]
    assert [order[i] == good[i] for i in range(24)].count(False) == 2
    assert not {"sample 3", "sample 17"} & set(order)
    again = Stream(source, seed=7)
    assert [caption(again, i) for i in reversed(range(24))] == order[::-1]
    bad = [skipped for i in range(24) for skipped in stream.read(i)[1]]
    assert Counter(bad_one.fault for bad_one in bad) == {"damaged image": len(bad)}
    assert {bad_one.key.rsplit("/")[-1] for bad_one in bad} == {"0003", "0017"}
    assert "0003: damaged image" in caplog.text


def test_bad_samples_are_listed_once_over_all_ranks(source, tokenizer, transform, tmp_path):
    break_samples(tmp_path, 3)
    feeds = open_feeds(
        [source], seed=7, tokenizer=tokenizer, transform=transform,
        image_token_id=1, end_of_chunk_id=2,
    )  # fmt: skip
    for ranks in (1, 2, 3):
        skipped = [
            bad.key
            for rank in range(ranks)
            for batches in step_loader(StepDataset(feeds, rank, ranks), 0, 1)
            for batch in batches["pairs"]
            for bad in batch.skipped
        ]
        assert skipped == ["pairs/s-0.tar/0003"]


def test_too_many_bad_samples_in_a_row_stop_with_the_list(source, tmp_path):
    break_samples(tmp_path, *range(24))
    with pytest.raises(TooManyBadSamples, match=r"(?s)'pairs': 4 bad.*kind.*s-\d.tar/00.*damaged"):
        Stream(source, seed=0, max_bad=4)[0]


def test_the_config_rejects_what_it_does_not_know():
    good = {"name": "x", "kind": "pairs", "shards": "x.tar", "batch": 2, "max_tokens": 8}
    assert SourceConfig.model_validate(good).weight == 1.0
    wrong = [("weight", 0), ("batch", 0), ("name", "a/b"), ("kind", "pears"), ("colour", 1)]
    for name, value in wrong:
        with pytest.raises(ValueError, match=name):
            SourceConfig.model_validate({**good, name: value})

"""webdataset's own stream, for those who want it."""

from __future__ import annotations

from collections import Counter

import pytest

from flamingo.data.classic import ClassicStream
from flamingo.data.config import Augment
from flamingo.data.document import Text


def captions(stream: ClassicStream) -> list[str]:
    return [item.text for document in stream for item in document.items if isinstance(item, Text)]


def test_an_epoch_has_each_sample_once_and_the_seed_decides_the_order(source):
    plain = captions(ClassicStream(source, buffer=0))
    assert plain == [f"sample {number}" for number in range(24)]
    one, same, other = (captions(ClassicStream(source, seed)) for seed in (1, 1, 2))
    assert Counter(one) == Counter(plain) and one == same != other


def test_ranks_share_the_shards(source, monkeypatch):
    found = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        found.append(set(captions(ClassicStream(source))))
    assert not found[0] & found[1] and len(found[0] | found[1]) == 24


def test_bad_samples_are_left_out_with_a_warning(source, write_tar, pair, caplog):
    write_tar("s-0.tar", {"0000": {**pair(0), "png": b"no picture"}, "0001": pair(1)})
    left = captions(ClassicStream(source, buffer=0))
    assert left[0] == "sample 1" and "s-0.tar/0000" in caplog.text


def test_it_does_not_pretend_to_augment(source):
    with pytest.raises(ValueError, match="augment"):
        ClassicStream(source.model_copy(update={"augment": Augment(flip=0.5)}))

"""Stored grids: found by the picture's content, refused for another encoder, never decoded again."""

from __future__ import annotations

import json

import pytest
import torch

from flamingo import features
from flamingo.config import FlamingoVisionConfig
from flamingo.data.document import Image, content_key
from flamingo.data.features import CARD, FeatureShards, members
from flamingo.data.stream import Stream
from flamingo.data.transforms import ImageTransform
from flamingo.data.writing import write_tars

ENCODER = {"name": "timm:x", "weights": "abc"}


@pytest.fixture
def folder(tmp_path):
    """Grids of two pictures, one of them of bfloat16 as frozen encoders make them."""
    grids = {content_key(b"one"): torch.ones(4, 3), content_key(b"two"): torch.full((4, 3), 2.0).bfloat16()}
    write_tars(tmp_path, "features-000000", members(grids.items()), 10)
    (tmp_path / CARD).write_text(json.dumps({"encoder": ENCODER}))
    return tmp_path


def test_a_grid_is_found_by_the_content_of_the_picture(folder):
    shards = FeatureShards(folder, ENCODER)
    assert content_key(b"one") in shards and content_key(b"three") not in shards
    grid = shards[content_key(b"two")]
    assert grid.dtype == torch.bfloat16 and torch.equal(grid, torch.full((4, 3), 2.0).bfloat16())


def test_grids_of_another_encoder_are_refused(folder):
    with pytest.raises(ValueError, match="another encoder.*weights 'abc', not 'xyz'"):
        FeatureShards(folder, {**ENCODER, "weights": "xyz"})


def test_a_folder_that_was_not_finished_is_refused(folder):
    (folder / CARD).unlink()
    with pytest.raises(ValueError, match="no readable features.json"):
        FeatureShards(folder, ENCODER)


def test_pictures_with_features_are_not_decoded(source, monkeypatch):
    def first(stream: Stream) -> Image:
        item = stream[0].items[0]
        assert isinstance(item, Image)
        return item

    plain = first(Stream(source, 1))
    known = first(Stream(source, 1, has_features=lambda key: key == plain.key))
    assert plain.image.size == (8, 8) and known.image.size == (1, 1) and known.key == plain.key
    from flamingo.data.config import Augment

    changed = source.model_copy(update={"augment": Augment(flip=1.0)})
    assert first(Stream(changed, 1, has_features=lambda key: True)).image.size == (8, 8)
    assert ImageTransform(4, (0.5,) * 3, (0.5,) * 3)(known.image).shape == (3, 4, 4)


def test_a_shard_without_samples_among_others_has_no_grids(write_tar, pair, transform, tmp_path, monkeypatch):
    encoder = torch.nn.Sequential(torch.nn.Flatten(2), torch.nn.Linear(16, 2))
    monkeypatch.setattr(features, "_opened", lambda folder: (encoder, transform))
    counts = []
    for name, samples in (("a.tar", {"0": pair(1)}), ("b.tar", {})):
        work = features._Work("model", write_tar(name, samples), "pairs", {}, str(tmp_path), f"grids-{name}")
        (tmp_path / ".cards").mkdir(exist_ok=True)
        counts.append(features._write(work)["samples"])
    assert counts == [1, 0]


SEEN = [(0.5, "center"), (0.4, "center"), (0.5, "squash")]


def test_an_encoder_that_sees_other_pixels_is_another_one():
    encoder = torch.nn.Linear(2, 2)
    transforms = [ImageTransform(4, (mean,) * 3, (0.5,) * 3, crop=crop) for mean, crop in SEEN]
    told = [features.fingerprint(encoder, FlamingoVisionConfig(), transform) for transform in transforms]
    assert len({one["weights"] for one in told}) == 1
    assert told[0] != told[1] != told[2] != told[0]
    assert json.loads(json.dumps(told[0])) == told[0]

"""No picture is encoded twice, and memory stays bounded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flamingo.train import features
from flamingo.train.features import FeatureCache

BYTES = 4 * 256 * 4  # of one grid: 2 x 2 places, 256 channels, float32


@pytest.fixture
def encoded(model, monkeypatch) -> list[int]:
    """How many pictures each call of the encoder had."""
    counts: list[int] = []
    encode = model.encode_images
    monkeypatch.setattr(model, "encode_images", lambda pixels: counts.append(len(pixels)) or encode(pixels))
    return counts


def without_pixels(batch, cache):
    """As the loader makes it when it asks the cache (`skip_pixels`)."""
    wanted = [number for number, key in enumerate(batch.image_keys) if not cache.has(key)]
    index = torch.full_like(batch.pixel_index, -1)
    index[wanted] = torch.arange(len(wanted))
    return replace(batch, pixel_values=batch.pixel_values[wanted], pixel_index=index)


def test_a_picture_is_encoded_once(model, make_batch, encoded):
    cache = FeatureCache(model, 1.0)
    batch = make_batch([3, 3], [1, 2])
    first = cache.grids(batch)
    assert encoded == [3] and all(cache.has(key) for key in batch.image_keys)
    again = cache.grids(without_pixels(batch, cache))
    assert encoded == [3]
    assert torch.equal(again, first)


def test_new_pictures_beside_known_ones_come_back_in_the_order_of_the_batch(model, make_batch, encoded):
    cache = FeatureCache(model, 1.0)
    batch = make_batch([3, 3, 3], [1, 2, 1])
    expected = model.encode_images(batch.pixel_values)
    cache.grids(make_batch([3], [2], first=1))  # the second row's
    encoded.clear()
    grids = cache.grids(without_pixels(batch, cache))
    assert encoded == [2]
    torch.testing.assert_close(grids, expected)


def test_many_pictures_are_encoded_in_parts_of_bounded_size(model, make_batch, encoded):
    batch = make_batch([3, 3], [3, 4])
    expected = model.encode_images(batch.pixel_values)
    encoded.clear()
    grids = FeatureCache(model, 0.0, chunk=3).grids(batch)
    assert encoded == [3, 3, 1]
    torch.testing.assert_close(grids, expected)


def test_on_a_cpu_pictures_are_encoded_in_few_numbers(model, make_batch, encoded):
    """Libraries prepare for each, and keep what they made."""
    FeatureCache(model, 0.0).grids(make_batch([3] * 5, [4] * 5))
    assert encoded == [8, 8, 4]


def test_how_many_at_a_time_is_asked_of_the_device_that_the_pictures_are_on(
    model, make_batch, encoded, monkeypatch
):
    """Not when the cache is made: the model is moved to its GPU after that."""
    cache, asked = FeatureCache(model, 0.0), []
    assert features.at_once(torch.device("cuda", 0)) == features.AT_ONCE == 32
    monkeypatch.setattr(features, "at_once", lambda device: asked.append(device) or 4)
    cache.grids(make_batch([3, 3], [3, 4]))
    assert asked == [torch.device("cpu")] and encoded == [4, 3]


@pytest.mark.parametrize(("fit", "kept"), [(0, 0), (1, 1), (2, 2), (9, 3)])
def test_it_keeps_no_more_than_its_bound(model, make_batch, fit, kept):
    cache = FeatureCache(model, fit * BYTES / 2**30)
    batch = make_batch([3], [3])
    for _ in range(2):
        grids = cache.grids(batch)
    assert sum(cache.has(key) for key in batch.image_keys) == kept
    # Of the storages: a view would keep the whole batch in memory.
    assert sum(g.untyped_storage().nbytes() for g in cache.kept.values()) == kept * BYTES
    assert len(grids) == 3  # what is not kept is made anew


def test_what_is_kept_is_not_changed_by_who_got_it(model, make_batch):
    cache = FeatureCache(model, 1.0)
    batch = make_batch([3], [2])
    first = cache.grids(batch)
    expected = first.clone()
    first.zero_()
    assert torch.equal(cache.grids(without_pixels(batch, cache)), expected)


def test_a_batch_without_images_has_no_grids(model, make_batch, encoded):
    assert FeatureCache(model, 1.0).grids(make_batch([3], [0])).shape == (0, 4, 256)
    assert encoded == []


def test_the_blank_picture_is_encoded_once_for_any_number(model, encoded):
    cache = FeatureCache(model, 0.0)
    shapes = [cache.blank(count).shape for count in (3, 1, 0)]
    assert shapes == [(3, 4, 256), (1, 4, 256), (0, 4, 256)] and encoded == [1]
    blank = model.encode_images(torch.zeros(1, 3, 64, 64))
    torch.testing.assert_close(cache.blank(2), blank.expand(2, -1, -1))


def test_a_blank_picture_is_encoded_anew_while_the_encoder_learns_and_teaches_it_nothing(model, encoded):
    cache = FeatureCache(model, 0.0)
    before = cache.blank(1).clone()
    model.unfreeze("vision_encoder")
    model.train()
    state = {name: value.clone() for name, value in model.vision_encoder.state_dict().items()}
    assert not cache.blank(1).requires_grad
    assert model.vision_encoder.training
    for name, value in model.vision_encoder.state_dict().items():  # statistics of batch norms too
        assert torch.equal(value, state[name]), name
    with torch.no_grad():
        for parameter in model.vision_encoder.parameters():
            parameter.add_(0.1)
    assert encoded == [1, 1] and not torch.equal(cache.blank(1), before)


def test_an_encoder_that_learns_sees_as_many_pictures_at_one_time_on_every_device(model, make_batch, encoded):
    model.unfreeze("vision_encoder")
    FeatureCache(model, 0.0).grids(make_batch([3] * 5, [4] * 5))
    assert encoded == [20]

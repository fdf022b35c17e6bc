"""A cache holds the images too: who continues from it sees what a whole prompt would show."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from flamingo.cache import SightLayer

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def whole(model, rows, pixels):
    return model(rows, pixel_values=pixels, use_cache=False).logits


@pytest.mark.parametrize("attend_to", ["immediate", "previous"])
def test_text_after_a_cached_image_sees_it_without_being_given_it_again(build, pixels, attend_to):
    model = build(attend_to=attend_to)
    i = model.config.image_token_id
    rows = torch.tensor([[i, 5, i, 6, 7, 8]])
    first = model(rows[:, :4], pixel_values=pixels[:2], use_cache=True)
    after = model(rows[:, 4:], cache=first.cache)
    torch.testing.assert_close(after.logits, whole(model, rows, pixels[:2])[:, 4:], **CLOSE)


def test_the_cache_may_come_under_its_older_name(build, pixels):
    model = build()
    rows = torch.tensor([[model.config.image_token_id, 5, 6, 7]])
    first = model(rows[:, :2], pixel_values=pixels[:1], use_cache=True)
    after = model(rows[:, 2:], past_key_values=first.past_key_values)
    torch.testing.assert_close(after.logits, whole(model, rows, pixels[:1])[:, 2:], **CLOSE)


@pytest.mark.parametrize("attend_to", ["immediate", "previous"])
def test_a_new_turn_brings_its_own_image(build, pixels, attend_to):
    model = build(attend_to=attend_to)
    i = model.config.image_token_id
    rows = torch.tensor([[i, 5, 6, 7, i, 8]])
    first = model(rows[:, :3], pixel_values=pixels[:1], use_cache=True)
    after = model(rows[:, 3:], pixel_values=pixels[1:2], cache=first.cache)
    torch.testing.assert_close(after.logits, whole(model, rows, pixels[:2])[:, 3:], **CLOSE)


def test_rows_that_are_reordered_repeated_or_selected_keep_their_images(model, pixels):
    i = model.config.image_token_id
    rows = torch.tensor([[i, 5, 6], [4, i, 7], [9, 8, 7]])
    new = torch.tensor([[3]])
    changes = {
        "reorder_cache": (torch.tensor([1, 1, 0]), [1, 1, 0]),
        "batch_select_indices": (torch.tensor([2, 1]), [2, 1]),
        "batch_repeat_interleave": (2, [0, 0, 1, 1, 2, 2]),
    }
    seen = whole(model, torch.cat((rows, new.expand(3, 1)), 1), pixels[:2])[:, -1:]
    for method, (argument, order) in changes.items():
        cache = model(rows, pixel_values=pixels[:2], use_cache=True).cache
        getattr(cache, method)(argument)
        after = model(new.expand(len(order), 1), cache=cache)
        torch.testing.assert_close(after.logits, seen[order], **CLOSE)


def test_a_cropped_cache_forgets_the_image_that_was_cropped(model, pixels):
    i = model.config.image_token_id
    rows = torch.tensor([[i, 5, i, 6]])
    cache = model(rows, pixel_values=pixels[:2], use_cache=True).cache
    cache.crop(-2)
    after = model(torch.tensor([[7]]), cache=cache)
    wanted = whole(model, torch.tensor([[i, 5, 7]]), pixels[:1])[:, -1:]
    torch.testing.assert_close(after.logits, wanted, **CLOSE)


def test_generation_goes_on_from_the_cache_of_an_earlier_answer(model, pixels):
    i = model.config.image_token_id
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    rows = torch.tensor([[i, 5, 6]])
    first = model.generate(rows, pixel_values=pixels[:1], return_dict_in_generate=True, **options)
    layer = SightLayer.of(first.cache)
    assert layer is not None and layer.seen.shape == (1, 6) and bool((layer.seen == 0).all())


def test_several_cached_rows_that_see_all_images_get_no_more_of_them(build, pixels):
    model = build(attend_to="previous")
    rows = torch.tensor([[model.config.image_token_id, 5]] * 2)
    cache = model(rows, pixel_values=pixels[:2], use_cache=True).cache
    with pytest.raises(ValueError, match="one by one"):
        model(rows, pixel_values=pixels[:2], cache=cache)


def test_a_cache_that_is_reset_shows_nothing(model, pixels):
    i = model.config.image_token_id
    cache = model(torch.tensor([[i, 5]]), pixel_values=pixels[:1], use_cache=True).cache
    layer = SightLayer.of(cache)
    assert layer is not None
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.media is None
    assert SightLayer.of(DynamicCache()) is None and SightLayer.of(None) is None

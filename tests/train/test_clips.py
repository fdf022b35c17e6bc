"""Clips from document to loss: several pictures, one <image> token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flamingo.data.packing import packed, padded
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.train.features import FeatureCache
from flamingo.train.objective import Objective

IMAGE = 21  # id of <image> in the tiny model


@pytest.fixture
def objective(model) -> Objective:
    torch.manual_seed(1)
    config = model.config
    config.resampler_frames = 4
    model = FlamingoForConditionalGeneration(config).train()
    return Objective(model, {"a": 1.0, "b": 1.0}, FeatureCache(model, 0.0), torch.float32)


def with_frames(batch, frames: list[int]):
    """The batch with so many pictures for each <image> token, all different."""
    count = sum(frames)
    pixels = torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(count))
    keys = [f"picture {n}" for n in range(count)]
    index = torch.arange(count)
    return replace(
        batch, pixel_values=pixels, pixel_index=index, image_keys=keys, frames=torch.tensor(frames)
    )


def loss_and_gradients(objective, passes):
    objective.zero_grad()
    loss, sums = objective(passes, {"a": 10, "b": 10})
    loss.backward()
    return sums, {n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None}


def test_a_clip_of_one_frame_is_an_image(objective, make_batch):
    batch = make_batch([6, 4], images=[1, 1])
    plain, _ = loss_and_gradients(objective, padded([batch, None]))
    clips, _ = loss_and_gradients(objective, padded([replace(batch, frames=torch.tensor([1, 1])), None]))
    torch.testing.assert_close(clips, plain, rtol=0, atol=1e-6)


def test_clips_images_and_text_train_together_and_packing_changes_nothing(objective, make_batch):
    clips = with_frames(make_batch([6, 4, 5], images=[1, 2, 0]), [3, 1, 2])
    images = make_batch([7, 3], images=[1, 0], first=10)
    apart = loss_and_gradients(objective, padded([clips, images]))
    together = loss_and_gradients(objective, packed([clips, images], 32, IMAGE))
    torch.testing.assert_close(together[0], apart[0], rtol=0, atol=1e-5)
    for name, gradient in apart[1].items():
        assert gradient.isfinite().all()
        torch.testing.assert_close(together[1][name], gradient, rtol=1e-4, atol=1e-5)
    assert apart[1]["model.resampler.frame_embs"][2].abs().sum() > 0


def test_padding_of_shorter_clips_is_not_seen(objective, make_batch):
    """The second clip beside a longer one, and alone."""
    batch = make_batch([6, 4], images=[1, 1])
    both = with_frames(batch, [3, 2])
    alone = with_frames(make_batch([4], images=[1], first=1), [2])
    alone = replace(alone, pixel_values=both.pixel_values[3:])
    empty = replace(both, labels=torch.where(torch.tensor([[True], [False]]), -100, both.labels))
    with torch.no_grad():
        sums, expected = (objective(padded([b, None]), {"a": 1, "b": 1})[1] for b in (empty, alone))
    torch.testing.assert_close(sums, expected, rtol=0, atol=1e-5)


def test_packed_rows_keep_the_pictures_of_each_clip_together(make_batch):
    clips = with_frames(make_batch([6, 4, 5], images=[1, 2, 1]), [3, 1, 2, 1])
    (rows,) = packed([clips], 12, IMAGE)
    assert rows.frames is not None
    taken = iter(rows.image_keys)
    groups = [[next(taken) for _ in range(count)] for count in rows.frames.tolist()]
    numbers = sorted([int(key.split()[1]) for key in group] for group in groups)
    assert numbers == [[0, 1, 2], [3], [4, 5], [6]]

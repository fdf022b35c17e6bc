"""The Perceiver resampler: any grid becomes a fixed number of latents."""

from __future__ import annotations

import pytest
import torch

from flamingo.config import FlamingoConfig, FlamingoVisionConfig
from flamingo.resampler import PerceiverResampler


def make(depth: int = 2, width: int | None = 16, encoder_width: int = 20) -> PerceiverResampler:
    torch.manual_seed(0)
    config = FlamingoConfig(
        vision_config=FlamingoVisionConfig(width=encoder_width),
        resampler_depth=depth,
        resampler_width=width,
        resampler_heads=2,
        resampler_head_dim=8,
        resampler_latents=5,
    )
    resampler = PerceiverResampler(config)
    torch.nn.init.normal_(resampler.latents)
    return resampler


def grid(images: int, places: int, width: int = 20) -> torch.Tensor:
    return torch.randn(images, places, width, generator=torch.Generator().manual_seed(places))


@pytest.mark.parametrize("places", [1, 4, 49, 256])
def test_the_number_of_latents_is_fixed_whatever_the_grid(places):
    resampler = make()
    out = resampler(grid(3, places))
    assert out.shape == (3, 5, 16)
    assert out.isfinite().all()


def test_without_a_width_of_its_own_it_has_the_encoders():
    resampler = make(width=None)
    assert resampler(grid(2, 4)).shape == (2, 5, 20)
    assert not any(name.startswith("project.") for name in resampler.state_dict())


def test_each_image_is_resampled_by_itself():
    resampler, images = make(), grid(4, 9)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(resampler(images[order]), resampler(images)[order])
    torch.testing.assert_close(resampler(images[1:2]), resampler(images)[1:2])


def test_what_is_at_each_place_matters_its_order_does_not():
    """No positions are added: the frozen encoder's grid carries them."""
    resampler, images = make(), grid(2, 9)
    shuffled = images[:, torch.randperm(9, generator=torch.Generator().manual_seed(0))]
    torch.testing.assert_close(resampler(shuffled), resampler(images), atol=1e-5, rtol=1e-5)
    for place in range(9):
        changed = images.clone()
        changed[:, place] += 3 * torch.randn(20, generator=torch.Generator().manual_seed(place))
        assert (resampler(changed) - resampler(images)).abs().max() > 1e-3


def test_a_grid_in_half_precision_gives_latents_in_the_resamplers_dtype():
    assert make()(grid(2, 4).bfloat16()).dtype == torch.float32


def test_every_parameter_gets_a_gradient():
    resampler = make()
    resampler(grid(2, 4)).square().sum().backward()
    missing = [n for n, p in resampler.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_attention_maps_are_shares_of_the_grid_and_follow_the_image(depth):
    resampler, images = make(depth), 3 * grid(3, 9)
    maps = resampler.attention_map(images)
    assert maps.shape == (3, 5, 9)
    assert (maps >= 0).all()
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones(3, 5))
    assert (maps[0] - maps[1]).abs().max() > 1e-3
    order = torch.tensor([4, 0, 8, 1, 2, 3, 5, 6, 7])
    torch.testing.assert_close(resampler.attention_map(images[:, order]), maps[..., order])


def test_the_attention_map_of_one_layer_is_its_attention():
    """Of one layer the rollout is the layer's attention to the grid, as shares."""
    resampler, images = make(depth=1), grid(2, 4)
    attention = resampler.layers[0][0]
    q, k, _ = attention.project(resampler.project(images), resampler.latents.expand(2, -1, -1))
    weights = (torch.einsum("nhqd,nhkd->nhqk", q, k) * 8**-0.5).softmax(dim=-1).mean(dim=1)[..., :4]
    expected = weights / weights.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(resampler.attention_map(images), expected)


def test_the_attention_map_holds_what_was_seen_in_earlier_layers():
    """Half of it stays; what is taken from another latent is that latent's map."""
    resampler, images = make(depth=2), 3 * grid(2, 4)
    torch.nn.init.zeros_(resampler.layers[1][0].to_q.weight)  # looks at all 4 + 5 alike
    maps = resampler.attention_map(images)
    del resampler.layers[1]
    first = resampler.attention_map(images)
    of_latents = first.mean(dim=1, keepdim=True)
    torch.testing.assert_close(maps, 0.5 * (1 / 9 + 5 / 9 * of_latents + first))

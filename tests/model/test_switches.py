"""Every architecture switch of FlamingoConfig does what it says: forward, backward, save, load."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from flamingo.config import CHOICES
from flamingo.layers import FeedForward, SquaredReLU, SwiGLU
from flamingo.media import Runs, sight
from flamingo.modeling import FlamingoForConditionalGeneration

IMAGE = 21
SWITCHES: list[dict] = [{name: value} for name, values in CHOICES.items() for value in values]
SWITCHES += [
    {"resampler_frames": 4},
    {"resampler_spatial": True},
    {"cross_attention_layers": [1, 3]},
    {"cross_attention_every": 3, "cross_attention_offset": 2},
    {"cross_attention_scale": [0.5, 4.0]},
    {"resampler_ff_mult": 2.0, "cross_attention_ff_mult": 1.5},
    {
        "cross_attention_ff": "swiglu",
        "cross_attention_norm": "rms",
        "cross_attention_qk_norm": "rms",
        "gate_shape": "channel",
        "attend_to": "previous",
        "resampler_qk_norm": "layer",
        "resampler_activation": "squared_relu",
    },
]


@pytest.mark.parametrize(
    "fields", SWITCHES, ids=lambda fields: ",".join(f"{k}={v}" for k, v in fields.items())
)
def test_a_model_with_the_switch_learns_everywhere_and_survives_a_folder(
    build, ids, pixels, tmp_path, fields
):
    model = build(**fields)
    loss = model(input_ids=ids, pixel_values=pixels, labels=ids).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.any(), name
    model.save_pretrained(tmp_path)
    again = FlamingoForConditionalGeneration.from_pretrained(tmp_path)
    for name, value in fields.items():
        assert getattr(again.config, name) == value
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids, pixel_values=pixels, labels=ids).loss, loss)


def changes(build, ids, pixels, **fields) -> bool:
    """Whether the switch changes the logits of a model with the same weights."""
    plain, other = build(), build(**fields)
    other.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        a, b = (m(input_ids=ids, pixel_values=pixels).logits for m in (plain, other))
    return not torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(
    "fields",
    [
        {"resampler_activation": "relu"},
        {"resampler_activation": "squared_relu"},
        {"resampler_qk_norm": "layer"},
        {"resampler_qk_norm": "rms"},
        {"cross_attention_ff": "relu"},
        {"cross_attention_ff": "squared_relu"},
        {"cross_attention_norm": "rms"},
        {"cross_attention_qk_norm": "rms"},
        {"cross_attention_qk_norm": "layer"},
        {"attend_to": "previous"},
        {"cross_attention_scale": [2.0, 2.0]},
        {"cross_attention_layers": [1, 2]},
    ],
    ids=str,
)
def test_the_switch_changes_what_is_computed(build, ids, pixels, fields):
    assert changes(build, ids, pixels, **fields)


def test_a_channel_gate_with_equal_entries_is_a_scalar_gate(build, ids, pixels):
    plain, channel = build(), build(gate_shape="channel")
    state = {
        name: value.expand(32).clone() if name.endswith("_gate") else value
        for name, value in plain.state_dict().items()
    }
    channel.load_state_dict(state)
    with torch.no_grad():
        a, b = (m(input_ids=ids, pixel_values=pixels).logits for m in (plain, channel))
    torch.testing.assert_close(a, b)


def test_the_scale_multiplies_what_a_block_adds(build):
    block = build(cross_attention_scale=[3.0, 1.0]).gated_blocks[0]
    same = build(cross_attention_scale=[1.0, 1.0]).gated_blocks[0]
    hidden, latents = torch.randn(1, 4, 32), torch.randn(1, 3, 16)
    runs = Runs.of(torch.tensor([[-1, 0, 0, 0]]))
    with torch.no_grad():
        for b in (block, same):
            b.ff_gate.zero_()
        keys, values = block.attn.project_media(latents)
        tripled, once = (b(hidden, keys, values, runs) - hidden for b in (block, same))
    torch.testing.assert_close(tripled, 3 * once)
    assert once.any()


def test_activations_are_those_of_their_names():
    x = torch.linspace(-2, 2, 9)
    assert torch.equal(SquaredReLU()(x), x.clamp_min(0) ** 2)
    feed = FeedForward(4, 2.0, "relu", "none")
    y = torch.randn(3, 4)
    torch.testing.assert_close(feed(y), F.relu(y @ feed[1].weight.T) @ feed[3].weight.T)
    gated = SwiGLU(4, 2.0, "none")
    expected = (F.silu(y @ gated.gate.weight.T) * (y @ gated.up.weight.T)) @ gated.down.weight.T
    torch.testing.assert_close(gated(y), expected)


def test_attending_to_previous_images_equals_attention_over_all_of_their_latents(build):
    """The reference: one softmax over the concatenated latents of the images so far."""
    model = build(attend_to="previous")
    block = model.gated_blocks[0]
    ids = torch.tensor([[IMAGE, 5, IMAGE, IMAGE, 6], [7, IMAGE, 8, 9, 10]])
    hidden, latents = torch.randn(2, 5, 32), torch.randn(4, 3, 16)
    seen, since = sight(ids, IMAGE, "previous")
    with torch.no_grad():
        block.ff_gate.zero_()
        keys, values = block.attn.project_media(latents)
        found = block(hidden, keys, values, Runs.of(seen, since))
        for row, images in ((0, [[0], [0], [0, 1], [0, 1, 2], [0, 1, 2]]), (1, [[], [3], [3], [3], [3]])):
            for place, which in enumerate(images):
                token = hidden[row, place]
                if which:
                    flat = latents[which].reshape(1, -1, 16)
                    k, v = block.attn.project_media(flat)
                    token = (
                        token
                        + block.attn(token[None], k, v, Runs.of(torch.tensor([[0]])))[0]
                        * block.attn_gate.tanh()
                    )
                torch.testing.assert_close(found[row, place], token, atol=1e-5, rtol=1e-5)


def test_a_picture_is_a_clip_of_one_frame(build, ids, pixels):
    model = build(resampler_frames=4)
    with torch.no_grad():
        a = model(input_ids=ids, pixel_values=pixels).logits
        b = model(input_ids=ids, pixel_values=pixels[:, None]).logits
    assert torch.equal(a, b)


def test_frames_beyond_a_clips_own_are_not_seen(build, ids):
    model = build(resampler_frames=4)
    clips = torch.randn(3, 4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    frames = torch.tensor([1, 4, 2])
    other = clips.clone()
    other[0, 1:], other[2, 2:] = 0.0, 9.0
    with torch.no_grad():
        a = model(input_ids=ids, pixel_values=clips, frames=frames).logits
        b = model(input_ids=ids, pixel_values=other, frames=frames).logits
        whole = model(input_ids=ids, pixel_values=clips).logits
        alone = model.media(pixel_values=clips[:1, :1]).latents
        among = model.media(pixel_values=clips, frames=frames).latents[:1]
    assert torch.equal(a, b) and not torch.allclose(a, whole)
    torch.testing.assert_close(alone, among, atol=1e-5, rtol=1e-5)


def test_the_order_of_frames_matters(build, ids):
    model = build(resampler_frames=4)
    clips = torch.randn(3, 4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = (model(input_ids=ids, pixel_values=c).logits for c in (clips, clips.flip(1)))
    assert not torch.allclose(a, b)


def test_longer_clips_than_trained_on_stretch_the_temporal_embeddings(build):
    resampler = build(resampler_frames=3).resampler
    with torch.no_grad():
        table = resampler.frame_embs
        stretched = resampler._temporal(5)
    torch.testing.assert_close(stretched[::2], table)
    torch.testing.assert_close(stretched[1], (table[0] + table[1]) / 2)
    assert torch.equal(resampler._temporal(2), table[:2])


def test_clips_without_temporal_embeddings_are_refused_with_the_setting(build, ids):
    with pytest.raises(ValueError, match="4 frames.*resampler_frames"):
        build()(input_ids=ids, pixel_values=torch.zeros(3, 4, 3, 64, 64))


@pytest.mark.parametrize("side", [96, 128])
def test_pictures_of_another_size_interpolate_the_spatial_embeddings(build, ids, side):
    """test_efficientnet strides by 32: 96 pixels are a grid of 3 x 3, trained on 2 x 2."""
    model = build(resampler_spatial=True)
    pixels = torch.randn(3, 3, side, side)
    with torch.no_grad():
        assert model(input_ids=ids, pixel_values=pixels).logits.isfinite().all()
        grids = model.encode_images(pixels)
        assert grids.shape[1] == (side // 32) ** 2
        shape = (side // 32, side // 32)
        a = model.media(pixel_values=pixels).latents
        b = model.media(grids=grids, grid_shape=shape).latents
    assert torch.equal(a, b)
    with pytest.raises(ValueError, match="grid_shape"):
        model.media(grids=grids)


def test_a_wide_picture_gives_a_wide_grid(build, ids):
    model = build(resampler_spatial=True)
    pixels = torch.randn(3, 3, 64, 128)
    assert model.grid_shape(pixels) == (2, 4)
    assert model(input_ids=ids, pixel_values=pixels).logits.isfinite().all()


def test_attention_maps_over_previous_images_and_over_frames(build, ids, pixels):
    model = build(attend_to="previous")
    maps = model.attention_maps(ids, pixels)
    assert maps.shape == (2, 7, 3, 4)
    seen, _ = sight(ids, IMAGE, "previous")
    torch.testing.assert_close(maps.sum(dim=(-2, -1)), (seen >= 0).float())
    assert maps[0, 5, :2].sum() > 0.99 and not maps[0, 5, 2].any()  # both of its own, no other row's
    clips = build(resampler_frames=2).attention_maps(ids, torch.randn(3, 2, 3, 64, 64))
    assert clips.shape == (2, 7, 2 * 4)


def test_looking_ahead_changes_what_is_seen(build, ids, pixels):
    model = build()
    ahead = torch.zeros_like(ids, dtype=torch.bool)
    with torch.no_grad():
        plain = model(input_ids=ids, pixel_values=pixels).logits
        same = model(input_ids=ids, pixel_values=pixels, look_ahead=ahead).logits
        ahead[0] = True
        other = model(input_ids=ids, pixel_values=pixels, look_ahead=ahead).logits
    assert torch.equal(plain, same)
    assert not torch.allclose(plain[0, 1], other[0, 1])
    torch.testing.assert_close(plain[1], other[1])


@pytest.mark.parametrize("name", sorted(CHOICES))
def test_an_unknown_choice_is_refused_with_those_there_are(build, name):
    with pytest.raises(ValueError, match=f"{name}='best': choose one of .*{CHOICES[name][0]}"):
        build(**{name: "best"})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"resampler_depth": "six"}, "resampler_depth='six'"),
        ({"resampler_frames": -1}, "resampler_frames=-1"),
        ({"cross_attention_scale": [1.0]}, "each of the 2 gated blocks"),
        ({"cross_attention_scale": [1.0, 0.0]}, "above 0"),
        ({"cross_attention_ff_mult": 0}, "cross_attention_ff_mult=0"),
    ],
)
def test_values_that_no_architecture_has_are_refused(build, fields, words):
    with pytest.raises(ValueError, match=words):
        build(**fields)

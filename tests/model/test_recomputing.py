"""Gradient checkpointing: layers are computed again instead of kept, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch

from flamingo.decoder import find_decoder_layers

LMS = {
    "llama": {},
    "gpt2": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3},
    # Its layers drop out in their own forward, by their own mode.
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3, "dropout": 0.5},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 4},
}
KINDS = pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])


def recomputing(model, reentrant: bool = False):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model.train()


def step(model, ids, pixels):
    """(loss, gradients, bytes kept for the backward pass)."""
    kept: dict[int, int] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.zero_grad()
    media = model.media(pixel_values=pixels) if len(pixels) else None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=ids, media=media, labels=ids).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return loss.detach(), gradients, sum(size for at, size in kept.items() if at not in weights)


@KINDS
@pytest.mark.parametrize("family", LMS)
def test_loss_and_gradients_are_those_of_the_plain_model(build, ids, pixels, family, reentrant):
    plain = build(family, lm=LMS[family]).train()
    other = recomputing(build(family, lm=LMS[family]), reentrant)
    loss, gradients, _ = step(plain, ids, pixels)
    again, found, _ = step(other, ids, pixels)
    assert torch.equal(loss, again)
    for name, expected in gradients.items():
        torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-5, msg=name)


@KINDS
def test_rows_of_text_only_learn_the_same(build, reentrant):
    """No image whose latents want gradients: the blocks' feed-forwards learn all the same."""
    ids, pixels = torch.tensor([[3, 4, 5, 20]]), torch.zeros(0, 3, 64, 64)
    _, gradients, _ = step(build().train(), ids, pixels)
    _, found, _ = step(recomputing(build(), reentrant), ids, pixels)
    assert gradients["gated_blocks.0.ff_gate"].any()
    for name, expected in gradients.items():
        if expected is None:
            assert found[name] is None
        else:
            torch.testing.assert_close(found[name], expected, msg=name)


@KINDS
def test_layers_and_blocks_really_run_twice_and_keep_less(build, ids, pixels, reentrant):
    ids = ids.repeat(1, 8)
    pixels = pixels.repeat(8, 1, 1, 1)
    sizes, counts = [], []
    for model in (build().train(), recomputing(build(), reentrant)):
        runs = dict.fromkeys(("layer", "block", "encoder"), 0)
        watched = {
            "layer": [layer.self_attn for layer in find_decoder_layers(model.language_model)],
            "block": [block.ff[0] for block in model.gated_blocks],
            "encoder": [model.vision_encoder],
        }

        def count(*_, name, runs=runs):
            runs[name] += 1

        for name, modules in watched.items():
            for module in modules:
                module.register_forward_pre_hook(lambda *_, name=name, count=count: count(name=name))
        sizes.append(step(model, ids, pixels)[2])
        counts.append(runs)
    assert counts == [{"layer": 4, "block": 2, "encoder": 1}, {"layer": 8, "block": 4, "encoder": 1}]
    assert sizes[1] < sizes[0] / 2


def test_only_in_training_mode_and_only_until_it_is_disabled(build, ids, pixels):
    model = recomputing(build())
    runs: list[int] = []
    find_decoder_layers(model.language_model)[0].self_attn.register_forward_pre_hook(
        lambda *_: runs.append(1)
    )
    step(model.eval(), ids, pixels)
    assert len(runs) == 1
    step(model.train(), ids, pixels)
    assert len(runs) == 3
    model.gradient_checkpointing_disable()
    step(model, ids, pixels)
    assert len(runs) == 4
    assert not any(module.training for module in model.language_model.modules())


def test_the_frozen_lm_drops_nothing_out(build, ids, pixels):
    model = recomputing(build("opt", lm=LMS["opt"]))
    layers = find_decoder_layers(model.language_model)
    assert all(layer.training for layer in layers)  # what transformers looks at
    inner = {m for layer in layers for m in layer.modules()} - set(layers)
    assert not any(module.training for module in inner)
    assert torch.equal(step(model, ids, pixels)[0], step(model, ids, pixels)[0])


def test_an_lm_that_is_trained_drops_out_and_recomputes_the_same(build, ids, pixels):
    losses = []
    for model in (build("opt", lm=LMS["opt"]), recomputing(build("opt", lm=LMS["opt"]))):
        model.unfreeze("language_model")
        model.train()
        torch.manual_seed(1)
        loss, gradients, _ = step(model, ids, pixels)
        losses.append((loss, gradients["resampler.latents"]))
    (loss, gradient), (again, found) = losses
    assert torch.equal(loss, again)
    torch.testing.assert_close(found, gradient)


def test_it_generates_and_copies_like_any_other(build, ids, pixels):
    model = recomputing(build())
    other = copy.deepcopy(model).eval()
    options = {"pixel_values": pixels, "max_new_tokens": 3, "do_sample": False}
    expected = build().generate(ids, **options)
    assert torch.equal(other.generate(ids, **options), expected)
    assert torch.equal(model.eval().generate(ids, **options), expected)

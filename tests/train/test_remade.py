"""Outputs of activation functions are made again in the backward pass, to the bit, and not kept."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from flamingo.train import objective as module
from flamingo.train.features import FeatureCache
from flamingo.train.objective import Objective
from flamingo.train.remade import packed, remade_activations, unpacked
from tests.train.test_objective import WEIGHTS, counts_of, gradients, passes

ACTIVATIONS = [F.silu, F.gelu, partial(F.gelu, approximate="tanh"), F.relu]


def layers(trained: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, requires_grad=trained) for shape in ((8, 64), (8, 64), (64, 8))]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=["silu", "gelu", "gelu by tanh", "relu"])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_gradients_are_the_same_to_the_bit(activation, trained, gated):
    gate, up, down = layers(trained)
    given = torch.randn(16, 8, requires_grad=True)
    wanted = [given, *([gate, down] if trained else [])]

    def learned(how) -> tuple[torch.Tensor, ...]:
        with how:
            hidden = activation(given @ gate)
            loss = ((hidden * (given @ up) if gated else hidden) @ down).square().sum()
        return torch.autograd.grad(loss, wanted)

    for found, other in zip(learned(nullcontext()), learned(remade_activations()), strict=True):
        assert torch.equal(found, other)


@pytest.mark.parametrize("activation", ACTIVATIONS[:3], ids=["silu", "gelu", "gelu by tanh"])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("shape", [(16, 8), (2, 8, 8)], ids=["rows", "pictures"])
def test_the_output_is_not_kept(activation, trained, shape):
    """Neither by a frozen gated layer, which multiplies it, nor by a trained one, which projects it, also
    where it flattens it before (the resampler's, of several pictures)."""
    gate, up, down = layers(trained)
    given = torch.randn(shape, requires_grad=True)

    def keeps_it(pack) -> bool:
        kept = []

        def note(saved: torch.Tensor):
            kept.append(pack(saved))
            return kept[-1]

        with torch.autograd.graph.saved_tensors_hooks(note, unpacked):
            hidden = activation(given @ gate)
            (hidden @ down if trained else hidden * (given @ up)).sum()
        tensors = [x if isinstance(x, torch.Tensor) else x[1] for x in kept]
        return hidden.untyped_storage().data_ptr() in {x.untyped_storage().data_ptr() for x in tensors}

    assert keeps_it(lambda saved: saved) and not keeps_it(packed)


def test_a_training_step_learns_the_same_from_less(model, make_batch, monkeypatch):
    batch = make_batch([6, 9], [1, 2])
    objective = Objective(model, WEIGHTS, FeatureCache(model, 0.0), torch.float32)

    def step() -> dict[str, torch.Tensor]:
        loss, _ = objective(passes({"captions": batch}), counts_of("captions", batch.n_targets))
        loss.backward()
        return gradients(objective)

    remade = step()
    calls = []
    monkeypatch.setattr(module, "remade_activations", lambda: calls.append(1) or nullcontext())
    kept = step()
    assert calls and remade.keys() == kept.keys()
    for name, grad in kept.items():
        assert torch.equal(remade[name], grad), name


@pytest.mark.parametrize("what", ["product", "down"])
@pytest.mark.parametrize("how", [nullcontext, remade_activations])
def test_what_was_written_into_since_is_not_taken_for_what_was_saved(what, how):
    """Neither what an activation is made again from, nor what is kept as it is."""
    gate, _, down = layers(True)
    given = torch.ones(2, 8, requires_grad=True)
    with how():
        product = given @ gate
        loss = (F.silu(product) @ down).sum()
    with torch.no_grad():
        {"product": product, "down": down}[what].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_output_that_was_written_into_before_it_was_saved_is_kept():
    _, _, down = (weight.requires_grad_() for weight in layers(True))

    def learned(how) -> torch.Tensor:
        given = torch.linspace(-1, 1, 128).reshape(2, 64).requires_grad_()
        with how:
            output = F.silu(given)
            with torch.no_grad():
                output[0] = 0.0
            loss = (output @ down).sum()
        return torch.autograd.grad(loss, down)[0]

    assert torch.equal(learned(nullcontext()), learned(remade_activations()))

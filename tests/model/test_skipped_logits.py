"""Where only the loss is wanted, a frozen head gives it without the logits of all targets."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from flamingo import nll
from flamingo.attention import attend_plainly
from flamingo.nll import head_nll

CLOSE = {"atol": 1e-6, "rtol": 1e-5}
WORDS = 13


@pytest.fixture(params=[1024, 5, 1], ids="parts of {}".format)
def parts(request, monkeypatch) -> int:
    """Words at a time: all, some with a rest, each alone."""
    monkeypatch.setattr(nll, "head_words", lambda device: request.param)
    return request.param


def frozen_head(dtype: torch.dtype = torch.float32, bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, WORDS, bias=bias, dtype=dtype).requires_grad_(False)


def inputs(rows: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """What goes into the head, and logits of two added tokens."""
    return tuple((2 * torch.randn(rows, n)).to(dtype).requires_grad_() for n in (6, 2))  # type: ignore[return-value]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("fill", [0, 3])
@pytest.mark.parametrize("count", [0, 1, 64])
def test_it_is_cross_entropy_of_the_heads_and_the_added_logits(parts, count, fill, bias):
    head, (hidden, added) = frozen_head(bias=bias), inputs(count + fill)
    targets, weights = torch.randint(WORDS + 2, (count,)), torch.randn(count)
    ours, _ = head_nll(head.weight, head.bias, hidden, added, targets)
    logits = torch.cat((head(hidden), added), dim=1)[:count]
    theirs = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(ours, theirs, **CLOSE)
    found, wanted = (torch.autograd.grad((nll * weights).sum(), (hidden, added)) for nll in (ours, theirs))
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert not any(grad[count:].any() for grad in found)


@pytest.mark.parametrize("beside_nll", [False, True])
def test_log_sums_have_the_gradient_of_those_of_logits(parts, beside_nll):
    """z-loss squares them."""
    head, (hidden, added) = frozen_head(), inputs(40)
    targets, weights = torch.randint(WORDS + 2, (37,)), torch.randn(37)
    nll, ours = head_nll(head.weight, None, hidden, added, targets)
    logits = torch.cat((head(hidden), added), dim=1)[:37]
    theirs = logits.logsumexp(dim=1)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    also = (nll, F.cross_entropy(logits, targets, reduction="none")) if beside_nll else (0, 0)
    losses = [(x.square() * weights + y).sum() for x, y in zip((ours, theirs), also, strict=True)]
    found, wanted = (torch.autograd.grad(loss, (hidden, added)) for loss in losses)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_logits_far_apart_overflow_nowhere(parts):
    head, (hidden, added) = frozen_head(), inputs(20)
    targets = torch.arange(20) % (WORDS + 2)
    with torch.no_grad():
        hidden *= 1000
        added[::2] *= 1000
    ours, _ = head_nll(head.weight, None, hidden, added, targets)
    theirs = F.cross_entropy(torch.cat((head(hidden), added), dim=1), targets, reduction="none")
    torch.testing.assert_close(ours, theirs, **CLOSE)
    found, wanted = (torch.autograd.grad(nll.sum(), (hidden, added)) for nll in (ours, theirs))
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert ours.max() > 500


def test_bfloat16_logits_are_summed_in_float32(parts):
    head, (hidden, added) = frozen_head(torch.bfloat16), inputs(50, torch.bfloat16)
    targets = torch.randint(WORDS + 2, (50,))
    ours, _ = head_nll(head.weight, None, hidden, added, targets)
    theirs = F.cross_entropy(torch.cat((head(hidden), added), dim=1).float(), targets, reduction="none")
    torch.testing.assert_close(ours, theirs, **CLOSE)
    found, wanted = (torch.autograd.grad(nll.sum(), (hidden, added)) for nll in (ours, theirs))
    assert [grad.dtype for grad in found] == [torch.bfloat16, torch.bfloat16]
    torch.testing.assert_close(found, wanted, atol=0.02, rtol=0.02)


def test_float32_weights_are_multiplied_in_autocasts_arithmetic():
    head, (hidden, added) = frozen_head(), inputs(50)
    targets = torch.randint(WORDS + 2, (50,))
    with torch.autocast("cpu", torch.bfloat16):
        ours, _ = head_nll(head.weight, None, hidden, added, targets)
        logits = head(hidden)
    assert logits.dtype == torch.bfloat16
    theirs = F.cross_entropy(torch.cat((logits.float(), added), dim=1), targets, reduction="none")
    torch.testing.assert_close(ours, theirs, **CLOSE)


def test_no_more_than_a_part_of_the_logits_is_made_at_one_time(parts):
    head, (hidden, added) = frozen_head(), inputs(30)
    with Widest() as widest:
        nll, _ = head_nll(head.weight, None, hidden, added, torch.zeros(30, dtype=torch.int64))
    assert widest.columns == min(parts, WORDS)
    kept = nll.grad_fn.next_functions[0][0].saved_tensors  # type: ignore[union-attr]
    assert {x.shape for x in kept} == {hidden.shape, added.shape}  # their gradients, no logits
    with Widest() as widest:
        nll.sum().backward()
    assert widest.columns == 0


class Widest(TorchDispatchMode):
    """The most columns of a product with the head's 6-wide rows."""

    columns = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default and args[0].shape[1] == 6:
            self.columns = max(self.columns, args[1].shape[1])
        return func(*args, **kwargs or {})


def test_without_gradients_none_are_made():
    head, (hidden, added) = frozen_head(), inputs(5)
    targets = torch.arange(5)
    with torch.no_grad():
        quiet, _ = head_nll(head.weight, None, hidden, added, targets)
    assert not quiet.requires_grad
    assert torch.equal(quiet, head_nll(head.weight, None, hidden, added, targets)[0].detach())


# -- in the model ------------------------------------------------------------------------------

HAND_ON = {"llama": {"num_key_value_heads": 2}, "qwen3": {"num_key_value_heads": 2, "head_dim": 8}, "opt": {}}
CHANGE = {
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8},  # caps
    "granite": {"num_key_value_heads": 2, "logits_scaling": 4.0},
    "cohere": {"num_key_value_heads": 2, "logit_scale": 0.5},
}


@pytest.mark.parametrize("family", HAND_ON)
def test_an_lm_that_gives_its_heads_logits_skips_them(build, family):
    assert build(family, lm=HAND_ON[family]).skips_logits


def test_the_way_in_which_an_lm_attends_does_not_matter(build):
    model = build()
    attend_plainly(model.language_model)
    assert model.skips_logits
    assert model.language_model.config._attn_implementation == "plain"


@pytest.mark.parametrize("family", CHANGE)
def test_an_lm_that_caps_or_scales_its_logits_does_not_skip_them(build, family):
    assert not build(family, lm=CHANGE[family]).skips_logits


def learned(model, ids, pixels, skip: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor], object]:
    """NLL of each target, gradients by name, logits."""
    model.zero_grad()
    labels = ids.masked_fill(ids == ids[0, 0], -100)
    out = model(
        input_ids=ids, pixel_values=pixels, labels=labels, reduction="none", skip_logits=skip, use_cache=False
    )
    (out.loss * torch.arange(1.0, len(out.loss) + 1)).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out.loss.detach(), grads, out.logits


BETWEEN = [(family, "cross_attention") for family in (*HAND_ON, *CHANGE, "gpt2")]


@pytest.mark.parametrize(("family", "fusion"), [*BETWEEN, ("llama", "prefix"), ("granite", "prefix")])
def test_loss_and_gradients_are_those_with_logits(build, ids, pixels, family, fusion):
    model = build(family, lm={**HAND_ON, **CHANGE}.get(family), fusion=fusion)
    model.double()  # so that rounding hides nothing
    (skipped, found, none), (whole, wanted, logits) = (
        learned(model, ids, pixels.double(), skip) for skip in (True, False)
    )
    assert (none is None) == model.skips_logits and logits is not None
    torch.testing.assert_close(skipped, whole, **CLOSE)
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert (found[name] - grad).norm() <= 2e-6 * grad.norm(), name


def test_a_head_that_is_trained_gets_its_gradient(build, ids, pixels):
    model = build()
    model.unfreeze("embeddings")
    _, found, logits = learned(model, ids, pixels, skip=True)
    assert not model.skips_logits and logits is not None
    assert found["language_model.lm_head.weight"].any()


def test_asking_an_lm_what_it_does_to_its_logits_draws_no_random_number(build):
    model, before = build(), torch.get_rng_state()
    assert model.skips_logits and torch.equal(before, torch.get_rng_state())

"""What is written by hand to keep less memory has the gradients of what it stands for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from flamingo.attention import plain_attention
from flamingo.nll import NLL_ROWS, token_nll

CLOSE = {"atol": 1e-6, "rtol": 1e-5}


@pytest.mark.parametrize("count", [0, 1, NLL_ROWS, 2 * NLL_ROWS + 3])
def test_the_nll_of_targets_is_that_of_cross_entropy(count):
    logits = (3 * torch.randn(count, 11)).requires_grad_()
    targets, wanted = torch.randint(11, (count,)), torch.randn(count)
    ours, theirs = token_nll(logits, targets), F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(ours, theirs, **CLOSE)
    grads = [torch.autograd.grad((nll * wanted).sum(), logits)[0] for nll in (ours, theirs)]
    torch.testing.assert_close(*grads, **CLOSE)


def test_the_nll_of_bfloat16_logits_is_summed_in_float32():
    logits = torch.randn(5, 5000).bfloat16().requires_grad_()
    targets = torch.randint(5000, (5,))
    ours = token_nll(logits, targets)
    theirs = F.cross_entropy(logits.float(), targets, reduction="none")
    torch.testing.assert_close(ours, theirs, **CLOSE)
    grads = [torch.autograd.grad(nll.sum(), logits)[0] for nll in (ours, theirs)]
    assert torch.equal(*grads) or (grads[0] - grads[1]).abs().max() < 1e-4


def test_the_nll_keeps_no_float32_copy_of_the_logits():
    logits = torch.randn(200, 5000).bfloat16().requires_grad_()
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x)
    with hooks:
        token_nll(logits, torch.zeros(200, dtype=torch.int64))
    assert sum(x.numel() for x in kept if x.dtype == torch.float32) == 200


@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_plain_attention_has_the_gradients_of_torchs(heads, masked):
    torch.manual_seed(0)
    q = torch.randn(2, 4, 5, 8, requires_grad=True)
    k, v = (torch.randn(2, heads, 5, 8, requires_grad=True) for _ in range(2))
    mask = torch.zeros(2, 1, 5, 5).masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -1e9)
    mask = mask if masked else None
    ours, _ = plain_attention(torch.nn.Identity(), q, k, v, mask)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    wanted = torch.randn_like(ours)
    for a, b in zip(
        *(torch.autograd.grad((x * wanted).sum(), (q, k, v)) for x in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_plain_attention_keeps_its_weights_once_in_the_dtype_of_the_queries():
    q, k, v = (torch.randn(1, 2, 30, 8).bfloat16().requires_grad_() for _ in range(3))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        plain_attention(torch.nn.Identity(), q, k, v, None)
    weights = [x for x in kept if x.shape[-2:] == (30, 30)]
    assert [x.dtype for x in weights] == [torch.bfloat16]


def test_plain_attention_trains_under_autocast_with_mixed_dtypes():
    """Rotary embeddings leave queries and keys in float32, values come from an autocast product."""
    q, k = (torch.randn(1, 2, 6, 8, requires_grad=True) for _ in range(2))
    v = torch.randn(1, 2, 6, 8).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = plain_attention(torch.nn.Identity(), q, k, v, None)
    grads = torch.autograd.grad(out.float().sum(), (q, k, v))
    assert out.dtype == torch.bfloat16 and [g.dtype for g in grads] == [q.dtype, k.dtype, v.dtype]

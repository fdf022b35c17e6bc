"""Small layers shared by the resampler and the gated blocks. Knows no other room.

N batch, Q queries, K keys, H heads, D head width, W model width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class SquaredReLU(nn.Module):
    """max(0, x) squared, the activation of the Flamingo paper (appendix A.1.2)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "squared_relu": SquaredReLU,
}


def make_norm(kind: str, width: int, eps: float = 1e-5) -> nn.Module:
    """ "layer", "rms", or nothing ("none"), over the last dimension."""
    if kind == "none":
        return nn.Identity()
    return nn.RMSNorm(width, eps=eps) if kind == "rms" else nn.LayerNorm(width, eps=eps)


class FeedForward(nn.Sequential):
    """Norm -> Linear -> activation -> Linear, without biases (float[..., W] -> float[..., W])."""

    def __init__(
        self, width: int, mult: float, activation: str = "gelu", norm: str = "layer", eps: float = 1e-5
    ):
        inner = int(width * mult)
        super().__init__(
            make_norm(norm, width, eps),
            nn.Linear(width, inner, bias=False),
            ACTIVATIONS[activation](),
            nn.Linear(inner, width, bias=False),
        )


class SwiGLU(nn.Module):
    """Norm -> down(silu(gate(x)) * up(x)), without biases (Shazeer 2020)."""

    def __init__(self, width: int, mult: float, norm: str = "layer", eps: float = 1e-5):
        super().__init__()
        inner = int(width * mult)
        self.norm = make_norm(norm, width, eps)
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.down(F.silu(self.gate(x)) * self.up(x))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """float[N, Q, H*D] -> float[N, H, Q, D]."""
    return rearrange(x, "n q (h d) -> n h q d", h=heads)


class _Taken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, back: Tensor, counts: Tensor | None) -> Tensor:
        ctx.save_for_backward(back, counts)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        back, counts = ctx.saved_tensors
        grad = grads[0].index_select(0, back)
        if counts is not None:
            grad.masked_fill_(~counts[:, None], 0.0)
        return grad, None, None, None


def taken(x: Tensor, index: Tensor, back: Tensor, counts: Tensor | None = None) -> Tensor:
    """x[index], float[M, W] of float[N, W], where each row that matters is taken once.

    index: int64[M]; back: int64[N], the place in the result whose gradient a row of x gets, so that it
    is taken from there and not added up from all places; counts: bool[N], rows of x that are taken
    at all, the others get no gradient (None: all). Places that repeat a row must not be used.
    """
    return _Taken.apply(x, index, back, counts)  # type: ignore[return-value]


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """The weights that `attend` uses, averaged over heads: float32[N, Q, K], rows sum to 1."""
    scores = torch.einsum("nhqd,nhkd->nhqk", q.float(), k.float()) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1).mean(dim=1)

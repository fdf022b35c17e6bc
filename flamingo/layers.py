"""Small layers shared by the resampler and the gated blocks. Knows no other room.

N batch, Q queries, K keys, H heads, D head width, W model width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class FeedForward(nn.Sequential):
    """LayerNorm -> Linear -> GELU -> Linear, without biases (float[..., W] -> float[..., W])."""

    def __init__(self, width: int, mult: float):
        inner = int(width * mult)
        super().__init__(
            nn.LayerNorm(width),
            nn.Linear(width, inner, bias=False),
            nn.GELU(),
            nn.Linear(inner, width, bias=False),
        )


def split_heads(x: Tensor, heads: int) -> Tensor:
    """float[N, Q, H*D] -> float[N, H, Q, D]."""
    return rearrange(x, "n q (h d) -> n h q d", h=heads)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Unmasked attention: float[N, H, Q, D] x float[N, H, K, D] -> float[N, Q, H*D]."""
    out = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype))
    return rearrange(out, "n h q d -> n q (h d)")


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """The weights that `attend` uses, averaged over heads: float32[N, Q, K], rows sum to 1."""
    scores = torch.einsum("nhqd,nhkd->nhqk", q.float(), k.float()) * q.shape[-1] ** -0.5
    return scores.softmax(dim=-1).mean(dim=1)

"""Tanh-gated cross-attention: what lets the tokens of a frozen LM look at an image.

Alayrac et al. 2022, section 2.2 and figure 4. Weight names follow released OpenFlamingo
checkpoints. B rows, T tokens, W LM width, N images, L latents, H heads, D head width,
R runs of tokens that see the same image, S slots of a run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from flamingo.config import FlamingoConfig
from flamingo.layers import FeedForward, attend, attention_weights, split_heads
from flamingo.media import Runs


@dataclass(frozen=True)
class Media:
    """Images as the gated blocks need them: per block, keys and values float[N, H, L, D]."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    latents: Tensor  # float[N, L, W]

    def __len__(self) -> int:
        return len(self.latents)


class CrossAttention(nn.Module):
    """Each token attends to the latents of the one image that it sees, to no other."""

    def __init__(self, width: int, media_width: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(media_width, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, width, bias=False)

    def project_media(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """float[N, L, W] -> keys, values float[N, H, L, D]: once per image, not per token."""
        k, v = self.to_kv(latents).chunk(2, dim=-1)
        return split_heads(k, self.heads), split_heads(v, self.heads)

    def queries(self, tokens: Tensor) -> Tensor:
        """float[R, S, W] -> float[R, H, S, D]."""
        return split_heads(self.to_q(self.norm(tokens)), self.heads)

    def forward(self, tokens: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """float[R, S, W] tokens with float[R, H, L, D] keys and values -> float[R, S, W]."""
        return self.to_out(attend(self.queries(tokens), keys, values))


class GatedCrossAttentionBlock(nn.Module):
    """x + scale * tanh(attn_gate) * attention, then x + scale * tanh(ff_gate) * feed-forward.

    scale: a constant (`FlamingoConfig.cross_attention_scale`), 1 in the paper.
    """

    def __init__(self, config: FlamingoConfig, width: int, media_width: int, scale: float = 1.0):
        super().__init__()
        self.scale = scale
        heads, head_dim = config.cross_attention_heads, config.cross_attention_head_dim
        self.attn = CrossAttention(width, media_width, heads, head_dim)
        self.attn_gate = nn.Parameter(torch.full((1,), float(config.gate_init)))
        self.ff = FeedForward(width, config.cross_attention_ff_mult)
        self.ff_gate = nn.Parameter(torch.full((1,), float(config.gate_init)))

    def forward(self, hidden: Tensor, keys: Tensor | None, values: Tensor | None, runs: Runs) -> Tensor:
        """float[B, T, W] -> float[B, T, W] in the same dtype; keys, values: float[N, H, L, D].
        None where no row has an image.

        A token that sees no image gets exactly zero from the attention (index_add touches only
        the others); the feed-forward applies to all tokens, as in the paper.
        """
        flat = rearrange(hidden, "b t w -> (b t) w").to(self.attn_gate.dtype)
        if keys is not None and values is not None and len(runs):
            looked = self.attn(flat[runs.token], keys[runs.image], values[runs.image])
            looked = rearrange(looked, "r s w -> (r s) w")[runs.slot] * (self.scale * self.attn_gate.tanh())
            flat = flat.index_add(0, runs.source, looked.to(flat.dtype))
        flat = flat + self.scale * self.ff_gate.tanh() * self.ff(flat)
        return flat.view_as(hidden).to(hidden.dtype)

    def attention_weights(self, hidden: Tensor, keys: Tensor, runs: Runs) -> Tensor:
        """Weights of the attention, mean over heads: float32[B, T, L]; zero where no image."""
        flat = rearrange(hidden, "b t w -> (b t) w")
        tokens = flat[runs.token].to(self.attn_gate.dtype)
        weights = attention_weights(self.attn.queries(tokens), keys[runs.image])
        out = weights.new_zeros(len(flat), weights.shape[-1])
        out[runs.source] = rearrange(weights, "r s l -> (r s) l")[runs.slot]
        return out.view(*hidden.shape[:2], -1)

"""Tanh-gated cross-attention: what lets the tokens of a frozen LM look at an image.

Alayrac et al. 2022, section 2.2 and figure 4. Weight names follow released OpenFlamingo
checkpoints. B rows, T tokens, W LM width, N images, L latents, H heads, D head width,
R runs of tokens that see the same image, S slots of a run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from flamingo.attention_products import attend
from flamingo.config import FlamingoConfig
from flamingo.layers import (
    FeedForward,
    SwiGLU,
    attention_weights,
    make_norm,
    split_heads,
)
from flamingo.media import Runs


@dataclass(frozen=True)
class Media:
    """Images as the gated blocks need them: per block, keys and values float[N, H, L, D]."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    latents: Tensor  # float[N, L, W]

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """What a token reads of an image: tensors whose first dimension counts images."""
        return (*self.keys, *self.values)

    def of_tables(self, tables: tuple[Tensor, ...]) -> Media:
        """The same of other tensors, in the order of `tables`; latents are not kept."""
        half = len(self.keys)
        return Media(tables[:half], tables[half:], self.latents.new_empty(len(tables[0]), 0))

    def pick(self, index: Tensor) -> Media:
        """The images of int64[M], in that order; one may come several times."""
        keys, values = (tuple(x[index] for x in per_block) for per_block in (self.keys, self.values))
        return Media(keys, values, self.latents[index])

    @classmethod
    def joined(cls, first: Media | None, second: Media | None) -> Media | None:
        """The images of both, numbered on; None where there are none."""
        if first is None or second is None:
            return first or second
        return cls(
            tuple(torch.cat(pair) for pair in zip(first.keys, second.keys, strict=True)),
            tuple(torch.cat(pair) for pair in zip(first.values, second.values, strict=True)),
            torch.cat((first.latents, second.latents)),
        )


class CrossAttention(nn.Module):
    """Each token attends to the latents of the image (or images) that it sees, to no other."""

    def __init__(
        self,
        width: int,
        media_width: int,
        heads: int,
        head_dim: int,
        norm: str = "layer",
        qk_norm: str = "none",
        eps: float = 1e-5,
    ):
        super().__init__()
        self.heads = heads
        self.norm = make_norm(norm, width, eps)
        self.q_norm, self.k_norm = make_norm(qk_norm, head_dim, eps), make_norm(qk_norm, head_dim, eps)
        self.to_q = nn.Linear(width, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(media_width, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, width, bias=False)

    def project_media(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """float[N, L, W] -> keys, values float[N, H, L, D]: once per image, not per token."""
        k, v = self.to_kv(latents).chunk(2, dim=-1)
        return self.k_norm(split_heads(k, self.heads)), split_heads(v, self.heads)

    def queries(self, tokens: Tensor, runs: Runs) -> Tensor:
        """float[K, W] or more, the tokens that see an image first -> float[R, H, S, D]. Runs have many
        lengths: what is done to a token by itself is done before they are padded to the longest."""
        return self.q_norm(split_heads(runs.spread(self.to_q(self.norm(tokens))), self.heads))

    def forward(self, tokens: Tensor, keys: Tensor, values: Tensor, runs: Runs) -> Tensor:
        """float[K', W], the tokens of `runs.rows`, with keys and values float[N, H, L, D] of all images
        -> float[K', W], of which the first K count."""
        queries, mask = self.queries(tokens, runs), runs.mask(keys.shape[2])
        looked = attend(queries, runs.gather(keys), runs.gather(values), mask)
        return self.to_out(runs.joined(looked))


class GatedCrossAttentionBlock(GradientCheckpointingLayer):
    """x + scale * tanh(attn_gate) * attention, then x + scale * tanh(ff_gate) * feed-forward.

    scale: a constant (`FlamingoConfig.cross_attention_scale`), 1 in the paper.
    """

    def __init__(self, config: FlamingoConfig, width: int, media_width: int, scale: float = 1.0):
        super().__init__()
        self.scale = scale
        heads, head_dim = config.cross_attention_heads, config.cross_attention_head_dim
        norm, eps = config.cross_attention_norm, config.cross_attention_eps
        gates = width if config.gate_shape == "channel" else 1
        self.attn = CrossAttention(
            width, media_width, heads, head_dim, norm, config.cross_attention_qk_norm, eps
        )
        self.attn_gate = nn.Parameter(torch.full((gates,), float(config.gate_init)))
        mult, kind = config.cross_attention_ff_mult, config.cross_attention_ff
        self.ff = (
            SwiGLU(width, mult, norm, eps) if kind == "swiglu" else FeedForward(width, mult, kind, norm, eps)
        )
        self.ff_gate = nn.Parameter(torch.full((gates,), float(config.gate_init)))

    def forward(self, hidden: Tensor, keys: Tensor | None, values: Tensor | None, runs: Runs) -> Tensor:
        """float[B, T, W] -> float[B, T, W] in the same dtype; keys, values: float[N, H, L, D].
        None where no row has an image.

        A token that sees no image gets exactly zero from the attention (index_add touches only
        the others); the feed-forward applies to all tokens, as in the paper.
        """
        flat = rearrange(hidden, "b t w -> (b t) w").to(self.attn_gate.dtype)
        if keys is not None and values is not None and len(runs):
            looked = self.attn(flat.index_select(0, runs.rows), keys, values, runs)
            looked = looked[: len(runs.source)] * (self.scale * self.attn_gate.tanh())
            flat = flat.index_add(0, runs.source, looked.to(flat.dtype))
        flat = flat + self.scale * self.ff_gate.tanh() * self.ff(flat)
        return flat.view_as(hidden).to(hidden.dtype)

    def attention_weights(self, hidden: Tensor, keys: Tensor, runs: Runs) -> Tensor:
        """Weights of the attention, mean over heads: float32[B, T, N, L]; zero where not seen."""
        latents = keys.shape[2]
        flat = rearrange(hidden, "b t w -> (b t) w")
        tokens = flat[runs.source].to(self.attn_gate.dtype)
        queries = self.attn.queries(tokens, runs)
        weights = attention_weights(queries, runs.gather(keys), runs.mask(latents))
        weights = rearrange(weights, "r s (m l) -> r s m l", l=latents)
        images = runs.image[:, None] if runs.images is None else runs.images  # [R, M]
        spread = weights.new_zeros(*weights.shape[:2], len(keys), latents)  # [R, S, N, L]
        index = repeat(images.clamp_min(0), "r m -> r s m l", s=weights.shape[1], l=latents)
        spread.scatter_add_(2, index, weights * (images >= 0)[:, None, :, None])
        out = weights.new_zeros(len(flat), len(keys), latents)
        out[runs.source] = rearrange(spread, "r s n l -> (r s) n l")[runs.slot]
        return out.view(*hidden.shape[:2], len(keys), latents)

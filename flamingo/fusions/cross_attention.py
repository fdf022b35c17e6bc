"""Tanh-gated cross-attention between frozen layers (Alayrac et al. 2022, section 2.2).

B rows, T tokens, N images, L latents, W their width, P places of the grids of an image.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flamingo.config import FlamingoConfig
from flamingo.cross_attention import GatedCrossAttentionBlock, Media
from flamingo.decoder import Conditioning
from flamingo.media import Runs


class Fusion:
    """One <image> token marks where an image stands; gated blocks look at its latents."""

    between, kept = True, True

    def __init__(self, config: FlamingoConfig):
        self.token = config.image_token_id

    def width(self, embedding_width: int) -> None:
        return None

    def image_tokens(self, count: int) -> int:
        return 1

    def values(self, config: FlamingoConfig, count: int, width: int) -> int:
        width = config.cross_attention_heads * config.cross_attention_head_dim
        return 2 * count * width * len(config.block_positions)

    def blocks(self, config: FlamingoConfig, text_width: int, connector_width: int) -> nn.ModuleList:
        scales = config.cross_attention_scale or [1.0] * len(config.block_positions)
        return nn.ModuleList(
            GatedCrossAttentionBlock(config, text_width, connector_width, scale) for scale in scales
        )

    def media(self, blocks: nn.ModuleList, latents: Tensor) -> Media:
        pairs = [block.attn.project_media(latents) for block in blocks]  # type: ignore[union-attr,operator]
        return Media(tuple(k for k, _ in pairs), tuple(v for _, v in pairs), latents)

    def conditioning(
        self, media: Media | None, ids: Tensor, seen: Tensor, since: Tensor | None, keep: Tensor | None
    ) -> Conditioning:
        return Conditioning(Runs.of(seen, since), media, keep)

    def looks(
        self, model: Any, ids: Tensor, mask: Tensor | None, seen: Tensor, since: Tensor | None,
        media: Media, places: Tensor,
    ) -> Tensor:  # fmt: skip
        """float32[B, T, P], with several images a token [B, T, N, P]: the blocks' attention, weighted by
        how far each gate is open (|tanh|), composed with the connector's float32[N, L, P]."""
        conditioning = Conditioning(Runs.of(seen, since), media, record={})
        with model._decoder.conditioned(conditioning):
            model.language_model(input_ids=ids, attention_mask=mask, use_cache=False)
        assert conditioning.record is not None
        gates = torch.stack([b.attn_gate.float().tanh().abs().mean() for b in model.gated_blocks])
        if not gates.any():  # all shut, as before training: every block counts alike
            gates = torch.ones_like(gates)
        shares = gates / gates.sum()
        tokens = sum(shares[i] * w for i, w in conditioning.record.items())  # [B, T, N, L]
        maps = torch.einsum("btnl,nlp->btnp", tokens, places)
        return maps if since is not None else maps.sum(dim=2)

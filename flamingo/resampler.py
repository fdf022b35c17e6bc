"""Perceiver resampler: a grid of patches becomes a fixed number of latents.

Alayrac et al. 2022, section 2.1 and figure 5. Weight names follow released OpenFlamingo
checkpoints, so that they load without renaming.
N images, G grid positions, E encoder width, L latents, W resampler width.
"""

from __future__ import annotations

import torch
from einops import repeat
from torch import Tensor, nn

from flamingo.config import FlamingoConfig
from flamingo.layers import FeedForward, attend, attention_weights, split_heads


class PerceiverAttention(nn.Module):
    """Latents attend to the grid and to themselves."""

    def __init__(self, width: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.norm_media = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(width, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, width, bias=False)

    def project(self, media: Tensor, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """float[N, G, W], float[N, L, W] -> q [N, H, L, D], k and v [N, H, G + L, D]."""
        latents = self.norm_latents(latents)
        context = torch.cat((self.norm_media(media), latents), dim=1)
        k, v = self.to_kv(context).chunk(2, dim=-1)
        q = self.to_q(latents)
        return split_heads(q, self.heads), split_heads(k, self.heads), split_heads(v, self.heads)

    def forward(self, media: Tensor, latents: Tensor) -> Tensor:
        return self.to_out(attend(*self.project(media, latents)))


class PerceiverResampler(nn.Module):
    """float[N, G, E] -> float[N, L, W]."""

    def __init__(self, config: FlamingoConfig):
        super().__init__()
        encoder_width = config.vision_config.width  # type: ignore[union-attr]
        self.width = config.resampler_width or encoder_width
        self.project: nn.Module = nn.Identity()
        if self.width != encoder_width:
            self.project = nn.Linear(encoder_width, self.width)
        self.latents = nn.Parameter(torch.empty(config.resampler_latents, self.width))
        heads, head_dim = config.resampler_heads, config.resampler_head_dim
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PerceiverAttention(self.width, heads, head_dim),
                    FeedForward(self.width, config.resampler_ff_mult),
                ]
            )
            for _ in range(config.resampler_depth)
        )
        self.norm = nn.LayerNorm(self.width)

    def forward(self, grid: Tensor) -> Tensor:
        media = self.project(grid.to(self.latents.dtype))
        latents = repeat(self.latents, "l w -> n l w", n=len(media))
        for attention, feed in self.layers:  # type: ignore[misc]
            latents = latents + attention(media, latents)
            latents = latents + feed(latents)
        return self.norm(latents)

    @torch.no_grad()
    def attention_map(self, grid: Tensor) -> Tensor:
        """Where each latent looks: float32[N, L, G], rows sum to 1.

        Attention rollout (Abnar and Zuidema 2020): a latent's map after a layer is the mean of
        its map before (the residual path) and of what it attended to in the layer, where
        attention to another latent counts as that latent's map.
        """
        media = self.project(grid.to(self.latents.dtype))
        latents = repeat(self.latents, "l w -> n l w", n=len(media))
        places, rollout = media.shape[1], None
        for attention, feed in self.layers:  # type: ignore[misc]
            q, k, _ = attention.project(media, latents)
            weights = attention_weights(q, k)  # [N, L, G + L]
            looked = weights[..., :places]
            if rollout is not None:
                looked = 0.5 * (looked + weights[..., places:] @ rollout + rollout)
            rollout = looked / looked.sum(dim=-1, keepdim=True)
            latents = latents + attention(media, latents)
            latents = latents + feed(latents)
        assert rollout is not None  # resampler_depth is at least 1
        return rollout

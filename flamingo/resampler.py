"""Perceiver resampler: a grid of patches becomes a fixed number of latents.

Alayrac et al. 2022, section 2.1 and figure 5. Weight names follow released OpenFlamingo
checkpoints, so that they load without renaming.
N images or clips, F frames, G grid positions, P = F * G, E encoder width, L latents,
W resampler width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from flamingo.attention_products import attend
from flamingo.config import FlamingoConfig
from flamingo.layers import FeedForward, attention_weights, make_norm, split_heads


class PerceiverAttention(nn.Module):
    """Latents attend to the grid and to themselves."""

    def __init__(self, width: int, heads: int, head_dim: int, qk_norm: str = "none"):
        super().__init__()
        self.heads = heads
        self.q_norm, self.k_norm = make_norm(qk_norm, head_dim), make_norm(qk_norm, head_dim)
        self.norm_media = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(width, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, width, bias=False)

    def project(self, media: Tensor, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """float[N, P, W], float[N or 1, L, W] -> q [N, H, L, D], k and v [N, H, P + L, D].

        Latents that are the same for all images, as before the first layer, are projected once.
        """
        latents = self.norm_latents(latents)
        own = (self.to_q(latents), self.to_kv(latents))
        q, kv = (x.expand(len(media), -1, -1) for x in own)
        k, v = torch.cat((self.to_kv(self.norm_media(media)), kv), dim=1).chunk(2, dim=-1)
        q, k = split_heads(q, self.heads), split_heads(k, self.heads)
        return self.q_norm(q), self.k_norm(k), split_heads(v, self.heads)

    def forward(self, media: Tensor, latents: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask: bool[N, 1, 1, P + L], None: everything is seen."""
        return self.to_out(attend(*self.project(media, latents), mask))


class PerceiverResampler(nn.Module):
    """float[N, G, E], or float[N, F, G, E] for clips -> float[N, L, W]."""

    def __init__(self, config: FlamingoConfig, out_width: int | None = None):
        """out_width: of the latents as they leave; None: `resampler_width`."""
        super().__init__()
        vision: Any = config.vision_config
        self.width = config.resampler_width or vision.width
        self.count = config.resampler_latents
        self.project: nn.Module = nn.Identity()
        if self.width != vision.width:
            self.project = nn.Linear(vision.width, self.width)
        self.latents = nn.Parameter(torch.empty(config.resampler_latents, self.width))
        self.grid = (int(vision.grid[0]), int(vision.grid[1]))
        self.frame_embs = self.grid_embs = None
        if config.resampler_frames:
            self.frame_embs = nn.Parameter(torch.empty(config.resampler_frames, self.width))
        if config.resampler_spatial:
            self.grid_embs = nn.Parameter(torch.empty(self.grid[0] * self.grid[1], self.width))
        heads, head_dim = config.resampler_heads, config.resampler_head_dim
        mult, activation = config.resampler_ff_mult, config.resampler_activation
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PerceiverAttention(self.width, heads, head_dim, config.resampler_qk_norm),
                    FeedForward(self.width, mult, activation),
                ]
            )
            for _ in range(config.resampler_depth)
        )
        self.norm: nn.Module = nn.LayerNorm(self.width)
        if out_width not in (None, self.width):
            self.norm = nn.Sequential(self.norm, nn.Linear(self.width, out_width))
            self.width = out_width

    @torch.no_grad()
    def reset(self, std: float) -> None:
        """Latents start as in the paper, tables of positions at `std`."""
        nn.init.normal_(self.latents)
        for table in (self.frame_embs, self.grid_embs):
            if table is not None:
                nn.init.normal_(table, std=std)

    def forward(
        self, grid: Tensor, frames: Tensor | None = None, shape: tuple[int, int] | None = None
    ) -> Tensor:
        """frames: int64[N], how many frames of each clip are its own (None: all); shape: rows and
        columns of the grid where they are not the config's."""
        media, mask = self.positions(grid, frames, shape)
        latents = rearrange(self.latents, "l w -> 1 l w")  # of each image from the first layer on
        for attention, feed in self.layers:  # type: ignore[misc]
            latents = latents + attention(media, latents, mask)
            latents = latents + feed(latents)
        return self.norm(latents)

    def positions(
        self, grid: Tensor, frames: Tensor | None = None, shape: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The projected grid with its embeddings, float[N, P, W], and the mask over P + L."""
        media = self.project(grid.to(self.latents.dtype))
        if media.ndim == 3:
            media = rearrange(media, "n g w -> n 1 g w")
        clips, count, places, _ = media.shape
        if self.grid_embs is not None:
            media = media + self._spatial(places, shape)
        if self.frame_embs is not None:
            media = media + rearrange(self._temporal(count), "f w -> f 1 w")
        elif count > 1:
            raise ValueError(
                f"clips of {count} frames, but the model has no order of frames: "
                "set resampler_frames to the number of frames to train on"
            )
        mask = None
        if frames is not None and bool((frames < count).any()):
            mine = torch.arange(count, device=media.device) < frames[:, None]  # [N, F]
            mine = repeat(mine, "n f -> n (f g)", g=places)
            mask = rearrange(F.pad(mine, (0, len(self.latents)), value=True), "n p -> n 1 1 p")
        return rearrange(media, "n f g w -> n (f g) w"), mask

    def _temporal(self, frames: int) -> Tensor:
        """float[F, W]: the trained embeddings; for longer clips stretched over them (section 2.1
        of the paper and appendix A.1.1: trained on 8 frames, used with 30)."""
        table = self.frame_embs
        assert table is not None
        if frames <= len(table):
            return table[:frames]
        stretched = F.interpolate(
            rearrange(table.float(), "f w -> 1 w f"), frames, mode="linear", align_corners=True
        )
        return rearrange(stretched, "1 w f -> f w").to(table.dtype)

    def _spatial(self, places: int, shape: tuple[int, int] | None) -> Tensor:
        """float[G, W]: the embeddings of the trained grid, interpolated to another grid's shape."""
        table, shape = self.grid_embs, shape or self.grid
        assert table is not None
        if shape[0] * shape[1] != places:
            raise ValueError(
                f"a grid of {places} places is not {shape[0]} x {shape[1]}: "
                "give media() the grid_shape of the features"
            )
        if shape == self.grid:
            return table
        rows, columns = self.grid
        square = rearrange(table.float(), "(r c) w -> 1 w r c", r=rows, c=columns)
        resized = F.interpolate(square, shape, mode="bicubic", align_corners=False)
        return rearrange(resized, "1 w r c -> (r c) w").to(table.dtype)

    @torch.no_grad()
    def attention_map(
        self, grid: Tensor, frames: Tensor | None = None, shape: tuple[int, int] | None = None
    ) -> Tensor:
        """Where each latent looks: float32[N, L, P], rows sum to 1.

        Attention rollout (Abnar and Zuidema 2020): a latent's map after a layer is the mean of
        its map before (the residual path) and of what it attended to in the layer, where
        attention to another latent counts as that latent's map.
        """
        media, mask = self.positions(grid, frames, shape)
        latents = rearrange(self.latents, "l w -> 1 l w")
        places, rollout = media.shape[1], None
        for attention, feed in self.layers:  # type: ignore[misc]
            q, k, _ = attention.project(media, latents)
            weights = attention_weights(q, k, mask)  # [N, L, P + L]
            looked = weights[..., :places]
            if rollout is not None:
                looked = 0.5 * (looked + weights[..., places:] @ rollout + rollout)
            rollout = looked / looked.sum(dim=-1, keepdim=True)
            latents = latents + attention(media, latents, mask)
            latents = latents + feed(latents)
        assert rollout is not None  # resampler_depth is at least 1
        return rollout

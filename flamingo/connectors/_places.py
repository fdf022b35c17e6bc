"""Connectors without attention: each vector is made of the places of one part of the grid.

N images, G grid positions, E encoder width, L vectors of an image, W their width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flamingo.config import FlamingoConfig
from flamingo.layers import make_norm


class Places(nn.Module):
    """float[N, G, E] -> norm -> means of neighbours -> `project` -> float[N, L, W]."""

    def __init__(
        self, config: FlamingoConfig, project: nn.Module, width: int, few: tuple[int, int] | None = None
    ):
        """few: (rows, columns) of vectors, each the mean of its part of the grid; None: one per place."""
        super().__init__()
        vision: Any = config.vision_config
        self.name, self.grid = config.connector, (int(vision.grid[0]), int(vision.grid[1]))
        self.norm = make_norm(config.connector_norm, vision.width)
        self.project, self.width = project, width
        self.places = self.grid[0] * self.grid[1]
        self.few = few
        self.count = self.places if few is None else few[0] * few[1]

    def forward(
        self, grid: Tensor, frames: Tensor | None = None, shape: tuple[int, int] | None = None
    ) -> Tensor:
        """Raises ValueError for clips, or a grid that is not the config's."""
        self._check(grid)
        x = rearrange(grid, "n 1 g e -> n g e") if grid.ndim == 4 else grid
        return self.project(self._pooled(self.norm(x.to(next(self.project.parameters()).dtype))))

    def _pooled(self, x: Tensor) -> Tensor:
        """float[N, G, E] -> float[N, L, E]."""
        if self.few is None:
            return x
        square = rearrange(x, "n (r c) e -> n e r c", r=self.grid[0])
        return rearrange(F.adaptive_avg_pool2d(square, self.few), "n e r c -> n (r c) e")

    def attention_map(
        self, grid: Tensor, frames: Tensor | None = None, shape: tuple[int, int] | None = None
    ) -> Tensor:
        """float32[N, L, G]: the places that each vector was made of."""
        self._check(grid)
        each = torch.eye(self.places, device=grid.device)  # [G, G]: a picture of each place
        share = self._pooled(rearrange(each, "g e -> 1 g e"))  # [1, L, G]
        return share.expand(len(grid), -1, -1)

    def reset(self, std: float) -> None:
        """Linear layers and norms start themselves."""

    def _check(self, grid: Tensor) -> None:
        if grid.ndim == 4 and grid.shape[1] > 1:
            raise ValueError(
                f"clips of {grid.shape[1]} frames: connector={self.name!r} takes single pictures; "
                "choose connector='perceiver'"
            )
        if grid.shape[-2] != self.places:
            raise ValueError(
                f"a grid of {grid.shape[-2]} places, connector={self.name!r} has vectors for {self.places} "
                f"({self.grid[0]} x {self.grid[1]}): pictures of one size, or connector='perceiver'"
            )


def width_of(config: FlamingoConfig, width: int | None) -> int:
    """As the fusion wants it, or as the gated blocks get it from the resampler."""
    vision: Any = config.vision_config
    return width or config.resampler_width or vision.width

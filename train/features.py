"""Grids of frozen images, kept so that no picture is encoded twice.

A frozen encoder without augmentation gives the same grid for the same picture, whatever the
step. Grids are kept by content key in memory up to a bound; beyond it they are made anew.
N images, G grid positions, E encoder width, S pixels a side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flamingo.data.augment import AUGMENTED
from flamingo.data.features import FeatureShards
from flamingo.data.packing import Rows
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.runtime import at_rest

AT_ONCE = 32  # pictures that are encoded at one time


def at_once(device: torch.device) -> int:
    """How many pictures are encoded at one time. On a CPU oneDNN prepares each convolution for each number of
    pictures, and what it keeps of that splits what is free: of few at a time there are few numbers
    (docs/decisions.md)."""
    return 8 if device.type == "cpu" else AT_ONCE


class FeatureCache:
    """Per process. `limit_gb` bounds it; 0 keeps nothing. stored: grids that were made before; chunk:
    pictures that are encoded at one time (None: `at_once`)."""

    def __init__(
        self,
        model: FlamingoForConditionalGeneration,
        limit_gb: float,
        chunk: int | None = None,
        stored: FeatureShards | None = None,
    ):
        self.model, self.limit, self.chunk, self.stored = model, limit_gb * 2**30, chunk, stored
        self.kept: dict[str, Tensor] = {}
        self.bytes = 0
        self._blank: Tensor | None = None

    def has(self, key: str) -> bool:
        """Whether the loader may skip the pixels of this picture."""
        return key in self.kept or (self.stored is not None and key in self.stored)

    def grids(self, rows: Rows) -> Tensor:
        """float[N, G, E], one per image of the rows in order, on the model's device."""
        if not rows.image_keys:
            config = self.model.config.vision_config
            places = config.grid[0] * config.grid[1]  # type: ignore[union-attr]
            return torch.empty(0, places, config.width, device=self.model.device)  # type: ignore[union-attr]
        pixels = rows.pixel_values
        # The model is moved after this was made. One that learns may have statistics of what it sees at once.
        chunk = self.chunk or (AT_ONCE if self._learns() else at_once(pixels.device))
        made = [self.model.encode_images(part) for part in pixels.split(chunk)] if len(pixels) else []
        new = torch.cat(made) if made else None
        grids = []
        for key, index in zip(rows.image_keys, rows.pixel_index.tolist(), strict=True):
            if index < 0:
                grids.append(self._held(key).to(self.model.device, non_blocking=True))
            else:
                assert new is not None
                grids.append(new[index])
                self._keep(key, new[index])
        return torch.stack(grids)

    def blank(self, count: int) -> Tensor:
        """float[count, G, E]: grids of a blank picture, without gradients. It is encoded once; while the
        encoder learns, whenever it is asked for, and teaches it nothing."""
        if self._blank is None or self._learns():
            size = self.model.config.vision_config.image_size  # type: ignore[union-attr]
            pixels = torch.zeros(1, 3, size, size, device=self.model.device)
            with torch.no_grad(), at_rest(self.model.vision_encoder):
                self._blank = self.model.encode_images(pixels)
        return self._blank.expand(count, -1, -1)

    def _learns(self) -> bool:
        return "vision_encoder" in self.model.trained_modules()

    def _held(self, key: str) -> Tensor:
        grid = self.kept.get(key)
        if grid is None:
            assert self.stored is not None, f"neither pixels nor a grid of picture {key}"
            grid = self.stored[key]
            self._keep(key, grid)
        return grid

    def _keep(self, key: str, grid: Tensor) -> None:
        size = grid.numel() * grid.element_size()
        if AUGMENTED not in key and key not in self.kept and self.bytes + size <= self.limit:
            self.kept[key] = grid.cpu().clone()
            self.bytes += size

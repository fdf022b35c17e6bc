"""The Perceiver resampler: a fixed number of latents that attend to the grid (Alayrac et al. 2022, 2.1)."""

from __future__ import annotations

from torch import nn

from flamingo.config import FlamingoConfig
from flamingo.resampler import PerceiverResampler


def build(config: FlamingoConfig, width: int | None) -> nn.Module:
    return PerceiverResampler(config, width)

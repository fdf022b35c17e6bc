"""Two linear layers with an activation between, a vector per place (Liu et al. 2023, LLaVA-1.5)."""

from __future__ import annotations

from typing import Any

from torch import nn

from flamingo.config import FlamingoConfig
from flamingo.connectors._places import Places, width_of
from flamingo.layers import ACTIVATIONS


def build(config: FlamingoConfig, width: int | None) -> nn.Module:
    vision: Any = config.vision_config
    wide = width_of(config, width)
    layers = nn.Sequential(
        nn.Linear(vision.width, wide), ACTIVATIONS[config.connector_activation](), nn.Linear(wide, wide)
    )
    return Places(config, layers, wide)

"""One linear layer, a vector per place (as Tsimpoukelli et al. 2021 and LLaVA 1.0 project features)."""

from __future__ import annotations

from typing import Any

from torch import nn

from flamingo.config import FlamingoConfig
from flamingo.connectors._places import Places, width_of


def build(config: FlamingoConfig, width: int | None) -> nn.Module:
    vision: Any = config.vision_config
    wide = width_of(config, width)
    return Places(config, nn.Linear(vision.width, wide), wide)

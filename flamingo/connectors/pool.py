"""The grid averaged to fewer places (`connector_grid`), and one linear layer."""

from __future__ import annotations

from typing import Any

from torch import nn

from flamingo.config import FlamingoConfig
from flamingo.connectors._places import Places, width_of


def build(config: FlamingoConfig, width: int | None) -> nn.Module:
    """Raises ValueError for more places than the grid has."""
    vision: Any = config.vision_config
    wide = width_of(config, width)
    (rows, columns), (few_rows, few_columns) = vision.grid, config.connector_grid
    if few_rows > rows or few_columns > columns:
        raise ValueError(
            f"connector_grid={list(config.connector_grid)}: more places than the encoder's grid of "
            f"{rows} x {columns}"
        )
    return Places(config, nn.Linear(vision.width, wide), wide, (few_rows, few_columns))

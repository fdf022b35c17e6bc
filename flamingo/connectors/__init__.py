"""From a patch grid to the vectors that a language model gets of an image, one file per way.

A connector is a module in this folder (or a dotted path elsewhere) with one function:
    build(config, width) -> nn.Module    width: of its vectors; None: as its own settings say
and the module that it builds has
    width, count                                             vectors of an image: float[count, width]
    forward(grid, frames, shape)                             float[N, G, E] -> float[N, L, W]
    attention_map(grid, frames, shape)                       float32[N, L, P], rows sum to 1 or are 0
    reset(std)                                               what `nn.Linear` and norms do not start
frames and shape are those of `FlamingoForConditionalGeneration.media`.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from torch import nn

from flamingo.config import FlamingoConfig


def connectors() -> list[str]:
    """Names of the connectors in this folder."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def connector(name: str) -> ModuleType:
    """The module of a connector. Raises ValueError, naming the choices, when there is none."""
    if name in connectors():
        return importlib.import_module(f"{__name__}.{name}")
    if "." in name:
        return importlib.import_module(name)
    raise ValueError(f"connector={name!r}: choose one of {', '.join(connectors())}")


def build(config: FlamingoConfig, width: int | None) -> nn.Module:
    """The connector of a config; width: what the fusion wants of it, None: its own."""
    return connector(config.connector).build(config, width)

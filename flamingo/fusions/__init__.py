"""How an image's vectors get into a language model, one file per way.

A fusion is a module in this folder (or a dotted path elsewhere) with one class, `Fusion(config)`:
    width(embedding_width)      what the connector's vectors must be as wide as; None: as they like
    image_tokens(count)         <image> tokens of an image in the LM's input, of `count` vectors
    values(config, count, width) numbers that are kept of an image of `count` vectors
    between                     whether its blocks stand between LM layers, one before each of
                                `config.block_positions`; without it they stand at no layer
    blocks(config, text_width, connector_width)   nn.ModuleList of what is trained beside the connector
    media(blocks, latents)      the images of a batch, of float[N, L, W]: len() is that of all their
                                <image> tokens; pick(int64[M]), joined(first, second), and by
                                image `tables`, of_tables(tensors)
    conditioning(media, ids, seen, since, keep)   what the hooks of one pass read (`decoder`)
    kept                        whether tokens after a cached image need it once more
    looks(model, ...)           where tokens look, see `FlamingoForConditionalGeneration.attention_maps`
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from flamingo.config import FlamingoConfig


def fusions() -> list[str]:
    """Names of the fusions in this folder."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def fusion(name: str) -> ModuleType:
    """The module of a fusion. Raises ValueError, naming the choices, when there is none."""
    if name in fusions():
        return importlib.import_module(f"{__name__}.{name}")
    if "." in name:
        return importlib.import_module(name)
    raise ValueError(f"fusion={name!r}: choose one of {', '.join(fusions())}")


def positions(config: FlamingoConfig) -> list[int]:
    """LM layers before which a block of the config's fusion stands."""
    return config.block_positions if getattr(fusion(config.fusion).Fusion, "between", False) else []

"""Flamingo: a frozen language model that sees, through gated cross-attention.

The public names load on first use, so that the command line answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flamingo.config import FlamingoConfig
    from flamingo.factory import create
    from flamingo.modeling import FlamingoForConditionalGeneration
    from flamingo.processing import FlamingoProcessor

__version__ = "0.1.0"
__all__ = ["FlamingoConfig", "FlamingoForConditionalGeneration", "FlamingoProcessor", "create"]

_PLACES = {
    "FlamingoConfig": "flamingo.config",
    "FlamingoForConditionalGeneration": "flamingo.modeling",
    "FlamingoProcessor": "flamingo.processing",
    "create": "flamingo.factory",
}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'flamingo' has no attribute {name!r}")

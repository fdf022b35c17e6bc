"""Frozen vision encoders, one file per source. Knows `config` only.

A source is a module in this folder (or a dotted path elsewhere) with three functions:
    describe(name, **options) -> FlamingoVisionConfig    what the encoder is, without weights
    build(config) -> nn.Module                           float[N, 3, H, W] -> float[N, G, E]
    load(module, name) -> None                           pretrained weights into it
Each raises ValueError for a name, option or folder that it cannot use, naming it and the remedy.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

import torch

from flamingo.config import FlamingoVisionConfig


def sources() -> list[str]:
    """Names of the sources in this folder."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def source(name: str) -> ModuleType:
    """The module of a source. Raises ValueError, naming the choices, when there is none."""
    if name in sources():
        return importlib.import_module(f"{__name__}.{name}")
    if "." not in name:
        raise ValueError(
            f"vision source {name!r}: choose one of {', '.join(sources())}, or name a module: my.module"
        )
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there; something that it imports is not
        raise ValueError(
            f"vision source {name!r}: there is no module {error.name!r}; name the folder that it lies in "
            f"with PYTHONPATH. The sources of this package are {', '.join(sources())}"
        ) from None
    functions = ("describe", "build", "load")
    if lacking := [part for part in functions if not callable(getattr(module, part, None))]:
        raise ValueError(f"vision source {name!r} lacks {', '.join(lacking)}: see flamingo/vision")
    return module


_DEVICE: ContextVar[str] = ContextVar("device that encoders are built on", default="cpu")


@contextmanager
def shapes_only() -> Iterator[None]:
    """Within this `with`, encoders are built on the meta device: for plans, without memory."""
    token = _DEVICE.set("meta")
    try:
        yield
    finally:
        _DEVICE.reset(token)


def build(config: FlamingoVisionConfig):
    """The encoder of a config with random weights, frozen."""
    # Also while transformers builds on the meta device: encoders keep tables that no checkpoint has.
    with torch.device(_DEVICE.get()):
        encoder = source(config.source).build(config)
    return encoder.eval().requires_grad_(False)

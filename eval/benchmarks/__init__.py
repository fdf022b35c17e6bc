"""Benchmarks, one file each. A benchmark is a module with

DESCRIPTION: str                               what it is, in a sentence
BLIND_ACCURACY: float | None                   what is possible without looking
queries() -> list[Example]                     what is asked
demonstrations() -> list[Example]              what shots are drawn from, never the test split
prompt(example) -> str                         text up to where the model goes on
completion(example) -> str                     what a shot continues its prompt with
score(prediction, example) -> float            0..1
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType


@dataclass(frozen=True)
class Example:
    """One question about one picture. `id` is unique within its benchmark and split."""

    id: str
    image: Path
    question: str
    answers: tuple[str, ...]
    kind: str


def names() -> list[str]:
    """The benchmarks of this folder."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    """A benchmark by name or dotted path. Raises ValueError, naming the choices."""
    if name in names():
        return importlib.import_module(f"{__name__}.{name}")
    if "." in name:
        return importlib.import_module(name)
    raise ValueError(f"benchmark {name!r}: choose one of {', '.join(names())}")

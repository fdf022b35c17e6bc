"""Metrics, one file each. A metric is a module with

TITLE: str                         its name in reports, e.g. "CIDEr-D"
SCALE: float                       what a value is multiplied with to be shown, e.g. 100
per_sample(predictions, examples) -> list[float] | None
                                   a value of each prediction whose mean is the metric's value;
                                   None where only the whole has one (BLEU, ROC-AUC)
value(predictions, examples) -> float
                                   over all predictions

predictions and examples are as many, in the same order. Adding a metric is adding a file.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def names() -> list[str]:
    """The metrics of this folder."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def load(name: str) -> ModuleType:
    """A metric by name or dotted path. Raises ValueError, naming the choices."""
    if name in names():
        return importlib.import_module(f"{__name__}.{name}")
    if "." in name:
        return importlib.import_module(name)
    raise ValueError(f"metric {name!r}: choose one of {', '.join(names())}, or name a module: my.module")

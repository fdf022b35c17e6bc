"""Flamingo: a frozen language model that sees, through gated cross-attention.

`import flamingo` makes the model known to transformers: `AutoModelForImageTextToText`,
`AutoProcessor`, `AutoImageProcessor` and `pipeline("image-text-to-text")` then load its folders.
That needs the classes, and with them torch and transformers (seconds). The commands (`flamingo
...`, `python -m flamingo.train`) answer at once instead: there nothing is registered before
`flamingo.registration` is imported, and the public names load on first use.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flamingo.config import FlamingoConfig
    from flamingo.factory import create
    from flamingo.modeling import FlamingoForConditionalGeneration
    from flamingo.processing import FlamingoImageProcessor, FlamingoProcessor

__version__ = "0.1.0"
__all__ = [
    "FlamingoConfig",
    "FlamingoForConditionalGeneration",
    "FlamingoImageProcessor",
    "FlamingoProcessor",
    "create",
]

_PLACES = {
    "FlamingoConfig": "flamingo.config",
    "FlamingoForConditionalGeneration": "flamingo.modeling",
    "FlamingoImageProcessor": "flamingo.processing",
    "FlamingoProcessor": "flamingo.processing",
    "create": "flamingo.factory",
}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'flamingo' has no attribute {name!r}")


def _is_command(script: str, words: Sequence[str]) -> bool:
    """Whether a process is `flamingo ...` or `python -m flamingo...`, from sys.argv[0] and sys.orig_argv."""
    if script == "-m":  # what it says while the module to run is being found
        return words[words.index("-m") + 1].split(".")[0] == "flamingo"
    return Path(script).stem == "flamingo"


if not _is_command("".join(sys.argv[:1]), sys.orig_argv):
    importlib.import_module("flamingo.registration")

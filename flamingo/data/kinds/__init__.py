"""Shard formats, one file each. A kind is a module with two functions:

    read(sample: Mapping[str, bytes], key: str) -> Document
        `sample` maps member extensions ("json", "0.png") to bytes, `key` is "source/shard/sample".
        Raises BadSample, and nothing else, for anything that is wrong with the sample.
    example() -> dict[str, bytes]
        A minimal good sample; the contract test damages it in every way.

A file added to this folder is a kind at once; modules that start with "_" are helpers.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def kind_names() -> list[str]:
    """Short names of the kinds in this folder, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def check_kind(name: str) -> str:
    """`name` if it is a short name of this folder or looks like a module path; imports nothing.

    Raises:
        ValueError: it is neither; lists the choices.
    """
    if "." in name or name in kind_names():
        return name
    raise ValueError(
        f"unknown kind {name!r}: choose one of {', '.join(kind_names())}, or give the dotted path of a module"
    )


def load_kind(name: str) -> ModuleType:
    """Short name ("pairs"), or dotted path of a module elsewhere ("my_lab.kinds.comics").

    Raises:
        ValueError: no such kind, or the module has no function `read`.
    """
    path = check_kind(name) if "." in name else f"{__name__}.{check_kind(name)}"
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise  # the module is there; something that it imports is not
        raise ValueError(
            f"kind {name!r}: there is no module {error.name!r}; "
            f"the kinds of this package are {', '.join(kind_names())}"
        ) from error
    if not callable(getattr(module, "read", None)):
        raise ValueError(f"kind {name!r}: the module has no function read(sample, key)")
    return module

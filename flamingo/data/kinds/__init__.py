"""Shard formats, one file each. A kind is a module with two functions:

    read(sample: Mapping[str, bytes], key: str) -> Document
        `sample` maps member extensions ("json", "0.png") to bytes, `key` is "source/shard/sample".
        Raises BadSample, and nothing else, for anything that is wrong with the sample.
    example() -> dict[str, bytes]
        A minimal good sample; the contract test damages it in every way.

A kind with settings has a class `Options` too, a pydantic model with `extra="forbid"` and defaults
for all its fields: the recipe's `options` of a source. Then it is read(sample, key, options). A
function requires(options) may raise ValueError where a package that they need is not installed.

A file added to this folder is a kind at once; modules that start with "_" are helpers.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from flamingo.data.document import Document

Reader = Callable[[Mapping[str, bytes], str], Document]


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
            f"kind {name!r}: there is no module {error.name!r}; name the folder that it lies in with "
            f"PYTHONPATH. The kinds of this package are {', '.join(kind_names())}"
        ) from error
    if not callable(getattr(module, "read", None)):
        raise ValueError(f"kind {name!r}: the module has no function read(sample, key)")
    return module


def reader(name: str, options: Mapping[str, Any]) -> Reader:
    """The function that reads samples of a kind, with its options; it pickles.

    Raises:
        ValueError: no such kind, or options that it does not have.
    """
    module = load_kind(name)
    fields = getattr(module, "Options", None)
    if fields is None:
        if options:
            raise ValueError(f"kind {name!r} has no options, the source gives {', '.join(options)}")
        return module.read
    try:
        given = fields.model_validate(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        known = ", ".join(sorted(fields.model_fields))
        raise ValueError(
            f"kind {name!r}, option {where!r}: {first['msg']} (got {first.get('input')!r}; it has {known})"
        ) from None
    if hasattr(module, "requires"):
        module.requires(given)
    return partial(module.read, options=given)


def longest_clip(name: str, options: Mapping[str, Any]) -> int:
    """Frames of the longest clip that a kind makes with these options; 1: it makes none."""
    given = getattr(reader(name, options), "keywords", {}).get("options")
    return getattr(given, "frames", 1)

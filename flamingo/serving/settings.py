"""Fields of `Sampling` that users write: `temperature=0.7`, or keys of a line of JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from functools import cache
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from flamingo.names import hint
from flamingo.serving.prompt import Sampling

NAMES = tuple(field.name for field in fields(Sampling))


def unknown(name: str, known: Iterable[str], what: str = "setting") -> str:
    """What is said of a name that is not known: the nearest one, or all."""
    return f"unknown {what} {name!r}; {hint(name, known)}"


def changed(sampling: Sampling, given: Mapping[str, Any], strict: bool = False) -> Sampling:
    """The same with other values. strict: numbers are numbers, as in JSON; else texts are read as such.

    Raises ValueError for a name that is not known, or a value of another type or outside its range.
    """
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name not in NAMES:
            raise ValueError(unknown(name, NAMES))
        try:
            values[name] = _adapter(name).validate_python(value, strict=strict)
        except ValidationError as error:
            raise ValueError(f"{name}={value!r}: {error.errors()[0]['msg']}") from None
    return replace(sampling, **values)


@cache
def _adapter(name: str) -> TypeAdapter:
    return TypeAdapter(get_type_hints(Sampling)[name])


def parsed(text: str) -> dict[str, str | None]:
    """`name=value name=value` of a command; `seed=none` is no seed. Raises ValueError where there is no =."""
    found: dict[str, str | None] = {}
    for word in text.split():
        name, equals, value = word.partition("=")
        if not equals or not value:
            raise ValueError(f"{word!r}: write name=value, e.g. temperature=0.7")
        found[name] = None if value.lower() == "none" else value
    return found

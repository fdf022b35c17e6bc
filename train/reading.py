"""A YAML file plus key=value overrides, read into typed models. Knows none of them.

Unknown keys are errors that name the nearest known key.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from flamingo.names import hint

R = TypeVar("R", bound=BaseModel)


def read(path: str | Path, overrides: list[str] | None, kind: type[R]) -> R:
    """A recipe from YAML with `a.b=value` overrides (values are YAML; `sources.NAME.x` by name).

    Raises ValueError, naming file, key and the nearest known key, for anything it cannot use.
    """
    path = Path(path)
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ValueError(f"recipe {path} is not there" + (f"; its folder has {near}" if near else ""))
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"recipe {path} is not text in UTF-8 ({error.reason}): name a YAML file") from None
    fields = _read_yaml(text, f"recipe {path}")
    if not isinstance(fields, dict):
        raise ValueError(f"recipe {path}: expected keys and values, found {type(fields).__name__}")
    for override in overrides or []:
        _override(fields, override)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        told = "; ".join(_explain(one, kind, fields) for one in error.errors())
        raise ValueError(f"recipe {path}: {told}") from None


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 1e-4 for text; here it is a number, as in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _read_yaml(text: str, what: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a subclass of SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(f"{what} is not YAML: {error}") from None


def _override(fields: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"override {override!r}: write key=value, e.g. optimizer.lr=1e-4")
    *parents, last = key.split(".")
    place: Any = fields
    for name in parents:
        if isinstance(place, list):
            place = _by_name(place, name, key)
        else:
            place = place.setdefault(name, {})
        if not isinstance(place, (dict, list)):
            raise ValueError(f"override {key}: {name} holds one value, it has no keys below it")
    if isinstance(place, list):
        raise ValueError(f"override {key}: {parents[-1]} is a list; write {parents[-1]}.NAME.{last}")
    place[last] = _read_yaml(text, f"override {key}: the value {text!r}")


def _by_name(items: list, name: str, key: str) -> dict:
    for item in items:
        if isinstance(item, dict) and item.get("name") == name:
            return item
    raise ValueError(f"override {key}: no {name!r} among {[i.get('name') for i in items]}")


def _explain(error: Any, kind: type[BaseModel], fields: Any) -> str:
    where = ".".join(_place(error["loc"], fields))
    if error["type"] != "extra_forbidden":
        return f"{where}: {error['msg']} (got {error.get('input')!r})" if where else error["msg"]
    known = _known_keys(error["loc"], kind)
    return f"unknown key {where}; {hint(str(error['loc'][-1]), known)}"


def _place(location: tuple, fields: Any) -> Iterator[str]:
    """The keys of a place in a recipe as an override has them: entries of lists by their names."""
    for part in location:
        known = isinstance(fields, dict) and part in fields
        fields = fields[part] if known or (isinstance(part, int) and isinstance(fields, list)) else None
        named = isinstance(part, int) and isinstance(fields, dict) and "name" in fields
        yield str(fields["name"] if named else part)


def _known_keys(location: tuple, kind: type[BaseModel]) -> list[str]:
    """The keys of the section that a place in a recipe lies in; numbers stand for entries of lists."""
    for part in location[:-1]:
        if part in kind.model_fields:
            kind = next(_sections(kind.model_fields[part].annotation), kind)
    return sorted(kind.model_fields)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """Models inside the type of a field: of a list, of something or None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inside in get_args(annotation):
        yield from _sections(inside)

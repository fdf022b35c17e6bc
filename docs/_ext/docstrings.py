"""Docstrings of this project are plain text: what reStructuredText would take for markup is escaped.

`code` between backticks stays code. Indented lines below `Attributes:`, `Raises:` and the like become a
list, one item a line with its indented rest; so do the parameters in `name: meaning; name: meaning`.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Collection, Iterator
from typing import Any

HEAD = re.compile(r"(Attributes|Args|Raises|Returns|Yields):\s*")
CODE = re.compile(r"(`+)(.+?)\1")


def escaped(text: str) -> str:
    """Text as reStructuredText; `code` and ``code`` as literals."""
    parts, end = [], 0
    for found in CODE.finditer(text):
        parts += [_plain(text[end : found.start()]), f"``{found[2]}``\\ "]
        end = found.end()
    return "".join([*parts, _plain(text[end:])]).rstrip("\\ ").strip()


def _plain(text: str) -> str:
    return re.sub(r"([\\*`|_])", r"\\\1", text)


def paragraphs(lines: list[str]) -> Iterator[list[str]]:
    """Runs of lines without an empty one."""
    run: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            run.append(line)
        elif run:
            yield run
            run = []


def items(lines: list[str]) -> list[str]:
    """One text per line of the least indentation, its deeper lines joined to it."""
    least = min(len(line) - len(line.lstrip()) for line in lines)
    found: list[str] = []
    for line in lines:
        if len(line) - len(line.lstrip()) == least or not found:
            found.append(line.strip())
        else:
            found[-1] += f" {line.strip()}"
    return found


def parameters(text: str, names: Collection[str]) -> tuple[str, list[str]]:
    """What stands before the first `name:` of these names, and the text from each on to the next.

    One begins the text, or stands behind a full stop or semicolon; `name, name:` is one too.
    """
    name = rf"`?(?:{'|'.join(map(re.escape, sorted(names))) or '(?!)'})`?"
    found = re.finditer(rf"(?:^|(?<=[;.]) )({name}(?:, {name})*: )", text)
    starts = [m.start(1) for m in found]
    pieces = [text[a:b].strip(" ;") for a, b in zip(starts, [*starts[1:], len(text)])]
    return text[: starts[0]].strip() if starts else text, pieces


def names_of(obj: Any) -> set[str]:
    """Parameters of a function, of a class's __init__, and fields of a class."""
    found = set(getattr(obj, "__annotations__", {}))
    with contextlib.suppress(TypeError, ValueError):  # a property, or what C is behind
        found |= set(inspect.signature(obj).parameters)
    return found


def restructured(lines: list[str], names: Collection[str] = ()) -> list[str]:
    """A docstring as reStructuredText; names: of parameters and fields."""
    out: list[str] = []
    for paragraph in paragraphs(lines):
        if head := HEAD.fullmatch(paragraph[0]):
            out += [f"**{head[1]}**", ""]
            paragraph = paragraph[1:]
        if not paragraph:
            continue
        if head or any(line[:1].isspace() for line in paragraph[1:]):
            out += [f"- {escaped(item)}" for item in items(paragraph)]
        else:
            out += _prose(paragraph, names)
        out.append("")
    return out


def _prose(lines: list[str], names: Collection[str]) -> list[str]:
    """A paragraph, cut where a line begins a sentence, with lists of the parameters that it explains."""
    parts: list[str] = []
    for line in map(str.strip, lines):
        if parts and not (parts[-1].endswith(".") and line[:1].isupper()):
            parts[-1] += f" {line}"
        else:
            parts.append(line)
    explained = [parameters(part, names) for part in parts]
    if sum(len(pieces) for _, pieces in explained) < 2:
        return [escaped(" ".join(parts))]
    out: list[str] = []
    for lead, pieces in explained:
        out += [escaped(lead), ""] if lead else []
        out += [f"- {escaped(piece)}" for piece in pieces]
        out.append("")
    return out


def _process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = restructured(lines, names_of(obj))


def _signature(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str | None, str | None]:
    """Without a configuration's, which lists what transformers adds too: a table has its fields."""
    return ("", None) if what == "class" and hasattr(obj, "sub_configs") else (signature, returned)


def setup(app: Any) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", _process)
    app.connect("autodoc-process-signature", _signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

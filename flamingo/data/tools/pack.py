"""`flamingo data pack`: folders of images and tables -> shards of pairs, vqa or interleaved."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flamingo.data.errors import BadSample
from flamingo.data.kinds import _members
from flamingo.data.kinds.vqa import Options, turns_of
from flamingo.data.tools.pictures import ending, picture
from flamingo.data.tools.tables import Row


@dataclass(frozen=True)
class FolderLayout:
    """Images with a .txt or .json of the same name beside them -> pairs."""

    root: str
    kind: str = "pairs"

    def settings(self) -> dict[str, str]:
        return {"layout": "folder"}

    def columns(self) -> list[str]:
        return ["image"]

    def members(self, row: Row) -> Mapping[str, bytes]:
        data = picture(row["image"], Path(self.root))
        beside = {name: picture(row[name], Path(self.root)) for name in ("txt", "json") if row[name]}
        _members.caption(beside)
        return {ending(data): data, **beside}

    def weigh(self, row: Row) -> int:
        names = [row[name] for name in ("image", "txt", "json") if row[name]]
        return sum(os.path.getsize(os.path.join(self.root, name)) for name in names)


@dataclass(frozen=True)
class TableLayout:
    """Columns of a table -> pairs (image, text), vqa (image, question, answers) or interleaved.

    Attributes:
        root: folder that paths of images start from, and must not leave.
        image, text, question, answer, items: names of columns; None: not used.
    """

    root: str
    image: str = "image"
    text: str | None = None
    question: str | None = None
    answer: str | None = None
    items: str | None = None

    def __post_init__(self) -> None:
        given = [self.text is not None, self.question is not None, self.items is not None]
        if sum(given) != 1 or (self.question is None) != (self.answer is None):
            raise ValueError(
                "name the columns of a table: --text-column for captions, --question-column and "
                "--answer-column for questions, or --items-column for interleaved documents"
            )

    @property
    def kind(self) -> str:
        return "interleaved" if self.items else "vqa" if self.question else "pairs"

    def settings(self) -> dict[str, str]:
        columns = {name: value for name, value in asdict(self).items() if value and name != "root"}
        return {"layout": "table", **{f"column of {name}": value for name, value in columns.items()}}

    def columns(self) -> list[str]:
        if self.items:
            return [self.items]
        return [name for name in (self.image, self.text, self.question, self.answer) if name]

    def members(self, row: Row) -> Mapping[str, bytes]:
        if self.items:
            return self._interleaved(_structure(_column(row, self.items)))
        data = picture(_column(row, self.image), Path(self.root))
        if self.text:
            words = _members.text(_column(row, self.text), f"column {self.text!r}")
            if not words.strip():
                raise BadSample("no text", f"column {self.text!r} is empty")
            return {ending(data): data, "txt": words.encode()}
        answers = _structure(_column(row, self.answer or ""))
        said = {"question": _column(row, self.question or "")}
        said["answers"] = answers if isinstance(answers, list) else [answers]
        sample = {ending(data): data, "json": _json(said)}
        turns_of(said, Options())  # raises BadSample for what the kind would not take
        return sample

    def weigh(self, row: Row) -> int:
        total = 0
        for name in filter(None, (self.image, self.text, self.question, self.items)):
            total += _weight(row.get(name), self.root)
        return total

    def _interleaved(self, items: Any) -> dict[str, bytes]:
        if not isinstance(items, list):
            raise BadSample("bad json", f"column {self.items!r} must hold a list, not {str(items)[:80]!r}")
        written, images = [], {}
        for item in items:
            if not isinstance(item, Mapping):
                raise BadSample("bad json", f"an item must be an object, not {str(item)[:80]!r}")
            item = {key: value for key, value in item.items() if value is not None}  # Parquet fills with null
            if "image" in item:
                data = picture(item["image"], Path(self.root))
                name = f"{len(images)}.{ending(data)}"
                images[name] = data
                item = {**item, "image": name}
            written.append(item)
        sample = {"json": _json({"items": written}), **images}
        if not any(str(item.get("text", "")).strip() and item.get("loss", True) for item in written):
            raise BadSample("no text", "nothing to learn: no text with loss")
        return sample


def _column(row: Row, name: str) -> Any:
    if name not in row:
        raise BadSample("missing column", f"no {name!r}; the row has {', '.join(map(str, row))}")
    return row[name]


def _structure(value: Any) -> Any:
    """A list as it is, or spelt in JSON, as a CSV has it; any other text stays text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadSample("bad json", str(error)) from None
    return value


def _json(value: Any) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, sort_keys=True).encode()
    except (TypeError, ValueError) as error:
        raise BadSample("bad json", str(error)) from None


def _weight(value: Any, root: str) -> int:
    """Bytes that a value stands for: of the file where it is a path within `root`."""
    if isinstance(value, Mapping):
        return sum(_weight(part, root) for part in value.values())
    if isinstance(value, (list, tuple)):
        return sum(_weight(part, root) for part in value)
    if isinstance(value, (bytes, bytearray)):
        return len(value)
    if isinstance(value, str):
        try:
            return os.path.getsize(os.path.join(root, value))
        except (OSError, ValueError):
            return len(value)
    return 8

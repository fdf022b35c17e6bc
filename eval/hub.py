"""A benchmark's data from a copy on the Hugging Face hub, instead of its official files.

`--data hub` takes the copy that the benchmark names as its HUB; `--data hub:owner/name` another
repository in the same layout, and `--data hub:FOLDER` one on disk (a clone, or parquet files). No code
of a repository is ever run. A benchmark that has one writes

    HUB = hub.Copy("owner/name", {"test": "validation"}, id="question_id", answers="answers")

    def examples(folder, split):
        if hub.asked(folder):
            return hub.examples(HUB, folder, split)

Pictures are written once, as they are in the copy, into a cache folder (FLAMINGO_CACHE, else
~/.cache/flamingo) under the digest of their content, and the examples beside them as JSON lines. A copy
that has changed is read anew.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, Union

from flamingo.eval.benchmarks import Example

WORD = "hub"
Column = Union[str, Callable[[Mapping[str, Any]], Any]]  # a column's name, or a function of a row
LAYOUT = 1  # of the cache; another number reads all copies anew


@dataclass(frozen=True)
class Copy:
    """Where a copy is, and which column is what. Of a column of class labels, the names are taken.

    Attributes:
        repo: owner/name of the data set on the hub. revision: a branch, tag or commit of it.
        splits: the benchmark's name of a split -> the copy's.
        id, question, answers, kind, context: of an Example, each a column or a function of the row
            without its picture; None: what Example has by itself, and as id the number of the row.
            answers: a text, or several; rows of one id are one example with the answers of all.
        image: the column of pictures.
        only: by the benchmark's split, (column, value) of the rows that belong to it.
        at_most: by the benchmark's split, a fixed sample of so many rows.
    """

    repo: str
    splits: Mapping[str, str]
    id: Column | None
    answers: Column
    question: Column | None = None
    kind: Column | None = None
    context: Column | None = None
    image: str = "image"
    only: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    at_most: Mapping[str, int] = field(default_factory=dict)
    revision: str | None = None

    @property
    def address(self) -> str:
        return f"https://huggingface.co/datasets/{self.repo}"


def asked(folder: Path | None) -> bool:
    """Whether `data` names a copy: "hub", or "hub:" and a repository or folder.

    A folder of official files that is itself called hub is given by its absolute path.
    """
    return folder is not None and (str(folder) == WORD or str(folder).startswith(f"{WORD}:"))


def chosen(copy: Copy, folder: Path) -> Copy:
    """The copy that `data` names: the benchmark's own, or another in its layout."""
    other = str(folder).removeprefix(WORD).removeprefix(":")
    return replace(copy, repo=other, revision=None) if other else copy


def examples(copy: Copy, folder: Path, split: str) -> list[Example]:
    """All examples of a split, in the copy's order; the picture of each is a file in the cache.

    Raises ValueError for a split or column that the copy lacks, for a picture that is none, and where
    the copy cannot be fetched.
    """
    copy = chosen(copy, folder)
    rows = _load(copy, split)
    place = cache_folder(copy.repo)
    stored = place / f"{split}-{_key(copy, split, rows)}.jsonl"
    if stored.exists():
        held = _read(stored)
        if all(e.image.exists() for e in held):
            return held
    found = _collect(copy, split, rows, place / "images")
    _write(stored, "".join(_spell(e, place) + "\n" for e in found).encode())
    return found


def class_names(copy: Copy, folder: Path, split: str, column: str) -> list[str]:
    """The names of a column of class labels, in the order of their numbers. Raises ValueError."""
    copy = chosen(copy, folder)
    names = getattr(_load(copy, split).features.get(column), "names", None)
    if names is None:
        raise ValueError(f"{copy.repo}: column {column!r} has no class labels; is it a copy in this layout?")
    return list(names)


def cache_folder(repo: str) -> Path:
    """Of one copy; a folder on disk is told from others of its name by its whole path."""
    root = Path(os.environ.get("FLAMINGO_CACHE") or "~/.cache/flamingo").expanduser()
    name = re.sub(r"[^\w.-]+", "--", repo).strip("-")
    if Path(repo).is_dir():
        name = f"{Path(repo).name}-{_digest(os.path.realpath(repo).encode())}"
    return root / "hub" / name


def _load(copy: Copy, split: str) -> Any:
    """The copy's split as a datasets.Dataset, pictures not decoded."""
    if split not in copy.splits:
        raise ValueError(f"{copy.repo} has no split {split!r}: choose one of {', '.join(copy.splits)}")
    try:
        import datasets
    except ImportError:
        raise ValueError("data=hub needs datasets: pip install 'flamingo-vlm[eval]'") from None
    source = os.path.abspath(copy.repo) if Path(copy.repo).is_dir() else copy.repo
    try:
        rows = datasets.load_dataset(source, split=copy.splits[split], revision=copy.revision)
    except Exception as error:  # of the network, the hub, the files: each library has its own
        said = " ".join(str(error).split())
        raise ValueError(
            f"data=hub:{copy.repo}, split {copy.splits[split]!r}, cannot be read "
            f"({type(error).__name__}: {said}). Where its owner asks for consent, give it on "
            f"{copy.address} and set HF_TOKEN; or name another copy, or a folder of the official files"
        ) from None
    needed = [c for c in _columns(copy, split) if isinstance(c, str)]
    if lacking := [c for c in needed if c not in rows.column_names]:
        raise ValueError(
            f"{copy.repo} has no column {lacking[0]!r}, only {', '.join(rows.column_names)}: "
            "name a copy in the layout of the benchmark's own"
        )
    return rows.cast_column(copy.image, datasets.Image(decode=False))


def _columns(copy: Copy, split: str) -> list[Column | None]:
    only = copy.only[split][0] if split in copy.only else None
    return [copy.image, copy.id, copy.answers, copy.question, copy.kind, copy.context, only]


def _key(copy: Copy, split: str, rows: Any) -> str:
    """Changes with the copy's content (the names of its Arrow files do) and with how it is read."""
    files = [file["filename"] for file in rows.cache_files]
    how = [_spelt(c.__code__) if isinstance(c, FunctionType) else str(c) for c in _columns(copy, split)]
    said = [LAYOUT, files, rows.num_rows, how, copy.only.get(split), copy.at_most.get(split)]
    return _digest(json.dumps(said).encode())


def _spelt(code: CodeType) -> str:
    """What a function does, the same in every process."""
    constants = [_spelt(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def _collect(copy: Copy, split: str, rows: Any, images: Path) -> list[Example]:
    from tqdm import tqdm

    texts = _Rows(rows.remove_columns(copy.image))
    first: dict[str, int] = {}
    answers: dict[str, list[str]] = {}
    for number in _wanted(copy, split, texts):
        row = texts(number)
        name = str(number if copy.id is None else _value(copy, copy.id, row))
        first.setdefault(name, number)
        given = _value(copy, copy.answers, row)
        answers.setdefault(name, []).extend([given] if isinstance(given, str) else map(str, given or ()))
    found = []
    for name, number in tqdm(first.items(), desc=f"{copy.repo}, {split}", unit="picture", disable=None):
        row = texts(number)
        question, kind, context = (
            str(_value(copy, column, row)) if column else ""
            for column in (copy.question, copy.kind, copy.context)
        )
        image = _picture(rows[number][copy.image], images, f"{copy.repo}, {split}, row {number}")
        found.append(Example(name, image, question, tuple(answers[name]), kind, context))
    return found


@dataclass(frozen=True)
class _Rows:
    """Rows without pictures, by number, with the names of class labels."""

    rows: Any

    def __call__(self, number: int) -> dict[str, Any]:
        row = self.rows[number]
        for column, feature in self.rows.features.items():
            if hasattr(feature, "int2str") and isinstance(row[column], int):
                row[column] = feature.int2str(row[column]) if row[column] >= 0 else None
        return row


def _wanted(copy: Copy, split: str, texts: _Rows) -> Sequence[int]:
    """Numbers of the rows of a split, in order."""
    numbers: Sequence[int] = range(texts.rows.num_rows)
    if split in copy.only:
        column, value = copy.only[split]
        numbers = [n for n, each in enumerate(texts.rows[column]) if each == value]
    most = copy.at_most.get(split)
    if most is not None and most < len(numbers):
        numbers = sorted(random.Random(0).sample(numbers, most))
    return numbers


def _value(copy: Copy, column: Column, row: Mapping[str, Any]) -> Any:
    try:
        return row[column] if isinstance(column, str) else column(row)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{copy.repo}: a row is not in the expected layout ({type(error).__name__}: {error}); "
            f"it has {', '.join(row)}"
        ) from None


def _picture(held: Mapping[str, Any] | None, images: Path, where: str) -> Path:
    """Its bytes as a file that is named by their digest."""
    from PIL import Image

    if not held or (held["bytes"] is None and not held["path"]):
        raise ValueError(f"{where} has no picture")
    data = held["bytes"] if held["bytes"] is not None else Path(held["path"]).read_bytes()
    try:
        with Image.open(io.BytesIO(data)) as image:
            kind = (image.format or "img").lower()
    except OSError as error:
        raise ValueError(f"{where}: its picture cannot be read ({error})") from None
    path = images / f"{_digest(data)}.{kind}"
    if not path.exists():
        _write(path, data)
    return path


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all, whoever else writes the same."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
        scratch.write_bytes(data)
        scratch.replace(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error}): set FLAMINGO_CACHE to a folder") from None


def _spell(example: Example, place: Path) -> str:
    fields = {**vars(example), "image": example.image.relative_to(place).as_posix()}
    return json.dumps(fields, ensure_ascii=False)


def _read(stored: Path) -> list[Example]:
    found = []
    for line in stored.read_text(encoding="utf-8").split("\n")[:-1]:
        fields = json.loads(line)
        image, answers = stored.parent / fields.pop("image"), tuple(fields.pop("answers"))
        found.append(Example(image=image, answers=answers, **fields))
    return found


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]

"""Rows of tables and folders, with a place for each, so that a task reads its own rows only.

A listing pass finds where every run of rows begins; tasks then start there. The rows of an input
are a pure function of its files, so the split into shards is one too.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import sys
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
TABLES = (".csv", ".jsonl", ".parquet", ".zip")

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """`count` rows of `file` that begin at `place`: a byte in CSV and JSONL, else a row number."""

    file: str
    place: int
    count: int


def form_of(path: Path) -> str:
    """ "folder", "dataset" (saved by Hugging Face `datasets`), "csv", "jsonl", "parquet" or "zip".

    Raises:
        ValueError: not there, or none of these.
    """
    if path.is_dir():
        return "dataset" if (path / "state.json").is_file() else "folder"
    if not path.is_file():
        raise ValueError(f"{path} is not there: name a folder of images, a table or a saved data set")
    if path.suffix.lower() not in TABLES:
        raise ValueError(f"{path} is no table of a known form ({', '.join(TABLES)}), and no folder")
    return path.suffix.lower()[1:]


def length(path: Path) -> int | None:
    """Rows of an input that says so in its header or listing; None: they have to be counted."""
    form = form_of(path)
    if form == "folder":
        return sum(1 for _ in folder_images(path))
    if form == "parquet":
        pyarrow = _tables_extra()
        try:
            return pyarrow.parquet.read_metadata(path).num_rows
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path} is not a sound Parquet file: {error}") from None
    return len(_saved(path)) if form == "dataset" else None


def rows_with_places(path: Path) -> Iterator[tuple[int, Row]]:
    """All rows of an input, in order, each with its place.

    Raises:
        ValueError: the file is not what its name says; names the line.
    """
    return _from(path, 0)


def read_run(run: Run) -> Iterator[Row]:
    """The rows of a run."""
    for _, row in itertools.islice(_from(Path(run.file), run.place), run.count):
        yield row


def _from(path: Path, place: int) -> Iterator[tuple[int, Row]]:
    form = form_of(path)
    if form == "csv":
        return _csv(path, place)
    if form == "jsonl":
        return _jsonl_file(path, place)
    rows = {"folder": _folder, "dataset": _dataset, "parquet": _parquet, "zip": _zip}[form](path, place)
    return enumerate(rows, place)


def _csv(path: Path, place: int) -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(min(sys.maxsize, (1 << 31) - 1))  # long documents in one field
    with open(path, "rb") as file:
        lines = _Lines(file)
        try:
            names = next(csv.reader(lines), [])
            if not names:
                raise ValueError(f"{path} is empty: its first line must name the columns")
            if place:
                file.seek(place)
                lines.place = place
            reader = csv.reader(lines, strict=True)
            while True:
                start = lines.place
                values = next(reader, None)
                if values is None:
                    return
                if not values:  # an empty line
                    continue
                if len(values) != len(names):
                    raise ValueError(f"{len(values)} fields, but {len(names)} columns")
                yield start, dict(zip(names, values, strict=True))
        except (csv.Error, UnicodeError, ValueError) as error:
            raise ValueError(f"{path}, row that ends at byte {lines.place}: {error}") from None


class _Lines:
    """Lines as text; `place` is the byte behind the last one that was asked for."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.place = file, 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self.file.readline()
        if not line:
            raise StopIteration
        first = self.place == 0
        self.place += len(line)
        return line.decode("utf-8-sig" if first else "utf-8")


def _jsonl_file(path: Path, place: int) -> Iterator[tuple[int, Row]]:
    with open(path, "rb") as file:
        file.seek(place)
        for line in file:
            if line.strip():
                yield place, _object(line, f"{path}, byte {place}")
            place += len(line)


def _object(line: bytes, where: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row must be a JSON object, not {type(row).__name__}")
    return row


def _zip(path: Path, place: int) -> Iterator[Row]:
    """Rows of all .jsonl files of an archive, in the order of their names."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(name for name in archive.namelist() if name.lower().endswith(".jsonl"))
            if not names:
                raise ValueError(f"{path} holds no .jsonl file")
            rows = itertools.chain.from_iterable(_zip_lines(archive, name, path) for name in names)
            for line, where in itertools.islice(rows, place, None):
                yield _object(line, where)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is not a sound zip: {error}") from None


def _zip_lines(archive: zipfile.ZipFile, name: str, path: Path) -> Iterator[tuple[bytes, str]]:
    with archive.open(name) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield line, f"{path}:{name}, line {number}"


def _parquet(path: Path, place: int) -> Iterator[Row]:
    pyarrow = _tables_extra()
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if place >= rows:
                    place -= rows
                    continue
                for batch in file.iter_batches(batch_size=256, row_groups=[group]):
                    if place >= batch.num_rows:
                        place -= batch.num_rows
                        continue
                    yield from batch.slice(place).to_pylist()
                    place = 0
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a sound Parquet file: {error}") from None


def _tables_extra() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise ValueError("Parquet tables need pyarrow: pip install 'flamingo-vlm[tables]'") from None
    return pyarrow


def _saved(path: Path) -> Any:
    """The saved data set; encoded pictures stay the bytes that they are."""
    try:
        from datasets import Dataset, Image, List, load_from_disk
    except ModuleNotFoundError:
        raise ValueError("a saved data set needs datasets: pip install 'flamingo-vlm[tables]'") from None
    held = load_from_disk(str(path))
    if not isinstance(held, Dataset):
        raise ValueError(
            f"{path} holds several splits ({', '.join(map(str, held))}): name one, as in {path}/train"
        )
    for name, feature in held.features.items():
        if isinstance(feature, Image):  # the encoded bytes as they are: no loss
            held = held.cast_column(name, Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), Image):
            held = held.cast_column(name, List(Image(decode=False)))
    return held


def _dataset(path: Path, place: int) -> Iterator[Row]:
    held = _saved(path)
    for number in range(place, len(held)):
        yield held[number]


def _folder(path: Path, place: int) -> Iterator[Row]:
    """{"image": path, "txt": path or None, "json": path or None}, from the folder, sorted."""
    for image in itertools.islice(folder_images(path), place, None):
        beside = {name: os.path.splitext(image)[0] + f".{name}" for name in ("txt", "json")}
        found = {name: rel if (path / rel).is_file() else None for name, rel in beside.items()}
        yield {"image": image, **found}


def folder_images(path: Path) -> Iterable[str]:
    """Images in a folder and its subfolders, as sorted paths from it.

    Raises:
        ValueError: two of them differ in their ending only, so they would share one caption.
    """
    found = sorted(
        os.path.relpath(os.path.join(top, name), path).replace(os.sep, "/")
        for top, _, names in os.walk(path)
        for name in names
        if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("._")
    )
    for one, other in itertools.pairwise(found):
        if os.path.splitext(one)[0] == os.path.splitext(other)[0]:
            raise ValueError(f"{path} holds {one} and {other}, which would share a caption: rename one")
    return found

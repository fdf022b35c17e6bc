"""Where indexes lie: a folder, or a Milvus.

R rows, D width of a vector.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import pydantic

from flamingo.data.writing import write_text
from flamingo.eval.retrieval import milvus
from flamingo.eval.retrieval.contents import Contents, Held, Manifest, read_manifest
from flamingo.eval.retrieval.search import Backend, Faiss

MANIFEST, IDS, ROWS = "manifest.json", "ids.json", "rows.jsonl"
Kind = TypeVar("Kind", bound=Held)
# Of what is said of each row -> float32[R, D], for a backend that keeps no vectors.
Load = Callable[[Sequence[str]], np.ndarray]


class Place(ABC):
    """A place for indexes, each of which has an address. kept: a folder for vectors by content."""

    kept: Path

    @abstractmethod
    def held(self, kind: type[Kind]) -> dict[str, Kind]:
        """Finished indexes of a kind by address. Raises ValueError for something else in their place."""

    @abstractmethod
    def address(self, what: str, similarity: str, encoder: str) -> str:
        """Of a new index. what: a benchmark, or another word on what it holds."""

    @abstractmethod
    def write(
        self,
        address: str,
        manifest: Held,
        about: Sequence[str],
        vectors: np.ndarray,
        ids: Sequence[str] | None = None,
    ) -> None:
        """float32[R, D] with a line on each row; in place of an index that is there.

        ids: of demonstrations, by which those that are new and gone can be named later.
        """

    @abstractmethod
    def about(self, address: str) -> list[str]:
        """What is said of each row of a catalogue."""

    @abstractmethod
    def backend(self, address: str, load: Load) -> AbstractContextManager[Backend]:
        """Open for searches."""

    def changed(self, manifest: Manifest, contents: Contents) -> list[str]:
        """What of the demonstrations is another than when they were indexed, in words."""
        return manifest.changed(contents)


class Folder(Place):
    """manifest.json, with it ids.json of demonstrations, or rows.jsonl of a catalogue; the vectors lie
    beside them by content, those of queries too."""

    def __init__(self, folder: Path):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"index {folder} is a file: name a folder, or FILE.db for Milvus Lite")
        self.kept = folder

    def held(self, kind: type[Kind]) -> dict[str, Kind]:
        file = self.kept / MANIFEST
        if not file.exists():
            return {}
        try:
            found = read_manifest(file.read_text())
        except (pydantic.ValidationError, UnicodeDecodeError):
            raise ValueError(
                f"{file} is not the manifest of an index, or was altered: choose another folder, or delete it"
            ) from None
        if not isinstance(found, kind):
            raise milvus.foreign(str(self.kept), found, kind)
        return {str(self.kept): found}

    def address(self, what: str, similarity: str, encoder: str) -> str:
        return str(self.kept)

    def write(
        self,
        address: str,
        manifest: Held,
        about: Sequence[str],
        vectors: np.ndarray,
        ids: Sequence[str] | None = None,
    ) -> None:
        name, listed = (ROWS, "\n".join(about)) if ids is None else (IDS, json.dumps(list(ids)))
        (self.kept / MANIFEST).unlink(missing_ok=True)  # first: the list and the manifest belong together
        write_text(self.kept / name, listed)
        said = manifest.model_dump_json(indent=1) + "\n"
        write_text(self.kept / MANIFEST, said)

    def about(self, address: str) -> list[str]:
        file = self.kept / ROWS
        return file.read_text().split("\n") if file.exists() else []

    @contextmanager
    def backend(self, address: str, load: Load) -> Iterator[Backend]:
        about = self.about(address)
        yield Faiss(load(about), about)

    def changed(self, manifest: Manifest, contents: Contents) -> list[str]:
        said = manifest.changed(contents)
        now = [example.id for example in contents.examples]
        before = json.loads((self.kept / IDS).read_text()) if said and (self.kept / IDS).exists() else now
        new, gone = (sorted(set(a) - set(b)) for a, b in ((now, before), (before, now)))
        said += [f"{len(new):,} are new, the first is {new[0]!r}"] if new else []
        return said + ([f"{len(gone):,} are gone, the first is {gone[0]!r}"] if gone else [])


class Milvus(Place):
    """A collection per index. Vectors by content lie beside a file, or else in the cache folder."""

    def __init__(self, where: milvus.Address):
        self.where = where
        file = where.file
        self.kept = cache_folder() if file is None else file.with_name(f"{file.name}.vectors")

    def held(self, kind: type[Kind]) -> dict[str, Kind]:
        file = self.where.file
        if file is not None and not file.exists():
            return {}
        with milvus.connected(self.where) as client:
            return milvus.held(client, self.where, kind)

    def address(self, what: str, similarity: str, encoder: str) -> str:
        return str(self.where.named(milvus.collection_name(what, similarity, encoder)))

    def write(
        self,
        address: str,
        manifest: Held,
        about: Sequence[str],
        vectors: np.ndarray,
        ids: Sequence[str] | None = None,
    ) -> None:
        with milvus.connected(self.where) as client:
            milvus.write(client, _parsed(address), manifest, vectors, about)

    def about(self, address: str) -> list[str]:
        with milvus.connected(self.where) as client:
            found = milvus.Collection(client, _parsed(address))
            return found.about(np.arange(found.rows))

    @contextmanager
    def backend(self, address: str, load: Load) -> Iterator[Backend]:
        with milvus.connected(self.where) as client:
            yield milvus.Collection(client, _parsed(address))


def _parsed(address: str) -> milvus.Address:
    found = milvus.Address.of(address)
    assert found is not None
    return found


def cache_folder() -> Path:
    """For vectors that have no folder of their own."""
    root = os.environ.get("FLAMINGO_CACHE") or "~/.cache/flamingo"
    return Path(root).expanduser() / "retrieval"


def place(where: str | None) -> Place:
    """Of `--index` or `--out`; None: the cache. Raises ValueError for what can be neither."""
    if where is None:
        return Folder(cache_folder())
    address = milvus.Address.of(where)
    return Folder(Path(where)) if address is None else Milvus(address)

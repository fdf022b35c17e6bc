"""Indexes in a Milvus: a file (Milvus Lite), a server, or Zilliz Cloud; one collection each.

A collection holds each row's vector with a word on it, and in row -1 the manifest, which is written
last: without it the collection is unfinished.

Q queries, R rows, K rows found, D width of a vector.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pydantic
from filelock import FileLock

from flamingo.eval.retrieval.contents import Held, read_manifest
from flamingo.runtime import logs_from

CONNECT_SECONDS, CALL_SECONDS = 10, 120  # that a Milvus may take
MOST = 16_384  # rows that a Milvus gives of a search
QUERIES = 64  # sent at a time
MESSAGE = 2**23  # bytes of vectors sent or fetched at a time
WORDS = 128  # words on rows fetched at a time, of up to 65,535 bytes each
TOKENS = ("FLAMINGO_MILVUS_TOKEN", "MILVUS_TOKEN")
PREFIX = "flamingo_"  # of collections that have no name of their own
MANIFEST = -1  # the row that holds it
FIELDS = {"row", "vector", "about"}
Kind = TypeVar("Kind", bound=Held)


@dataclass(frozen=True)
class Address:
    """uri: FILE.db, or http://host:19530; collection: its name, None: found by what is asked for."""

    uri: str
    collection: str | None = None

    @classmethod
    def of(cls, where: str) -> Address | None:
        """None: a folder. `URI#NAME` names the collection. Raises ValueError for a password in it."""
        uri, _, name = where.partition("#")
        if not (re.match(r"(https?|tcp)://|unix:", uri) or uri.endswith(".db")):
            return None
        if "://" in uri and "@" in uri:
            raise ValueError(
                f"index {re.sub('//.*@', '//...@', uri)}: no password in an address, it would be written "
                f"to results; set {TOKENS[0]}, to a token or USER:PASSWORD"
            )
        return cls(uri, name or None)

    def __str__(self) -> str:
        return self.uri + (f"#{self.collection}" if self.collection else "")

    @property
    def file(self) -> Path | None:
        """Of a Milvus Lite."""
        return Path(self.uri) if self.uri.endswith(".db") and "://" not in self.uri else None

    def named(self, collection: str) -> Address:
        """The same where it has a name."""
        return self if self.collection else replace(self, collection=collection)


@contextmanager
def connected(address: Address) -> Iterator[Any]:
    """A pymilvus client. A file is open in one process at a time: the others wait.

    Raises ValueError for a server that does not answer, and for whatever it refuses within.
    """
    try:
        from pymilvus import MilvusClient
        from pymilvus.exceptions import MilvusException
    except ImportError:
        raise ValueError("pymilvus is not there: pip install 'flamingo-vlm[milvus]'") from None
    file, token = address.file, next((os.environ[name] for name in TOKENS if os.environ.get(name)), "")
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_file():
            raise ValueError(f"{file} is a database of an older Milvus Lite, or none: choose another name")
    with _alone(file) if file is not None else nullcontext():
        client = None
        try:
            client = MilvusClient(address.uri, token=token, timeout=CONNECT_SECONDS)
            yield client
        except MilvusException as error:
            raise ValueError(_explained(address, error, token, client is None)) from None
        finally:
            if client is not None:
                client.close()
            if file is not None:
                _release(file)


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """One process at a time. Milvus Lite answers calls that it does not know with a traceback on the
    terminal, though pymilvus does without them: what matters reaches the client as an exception."""
    with logs_from(logging.CRITICAL, "grpc._server"), FileLock(f"{file}.lock"):
        yield


def _explained(address: Address, error: Any, token: str, connecting: bool) -> str:
    said = str(error.message or error)
    said = said.replace(token, "***") if token else said
    if not connecting:
        return f"Milvus {address.uri}: {said}"
    if address.file is not None:
        return f"Milvus Lite {address.uri} cannot be opened ({said}): has another program opened it?"
    return (
        f"Milvus {address.uri} does not answer within {CONNECT_SECONDS} s ({said}): is it running, is the "
        f"address right, does it want a token ({TOKENS[0]})?"
    )


def _release(file: Path) -> None:
    """Closing a client leaves the file open in this process, and locked to all others."""
    try:
        from milvus_lite.server_manager import server_manager_instance
    except ImportError:
        return
    server_manager_instance.release_server(str(file))


def collection_name(benchmark: str, similarity: str, encoder: str) -> str:
    """Of an index: letters, digits and underscores."""
    import hashlib

    readable = re.sub(r"\W+", "_", f"{PREFIX}{benchmark}_{similarity}_{encoder.rpartition('/')[2]}")
    return f"{readable[:200]}_{hashlib.sha256(encoder.encode()).hexdigest()[:8]}"


class Unfinished(ValueError):
    """A collection of ours whose writing was interrupted."""


class Collection:
    """A finished index in a Milvus. Raises ValueError for a collection of another kind."""

    most = MOST

    def __init__(self, client: Any, address: Address):
        self._client, self._name = client, str(address.collection)
        width = _width(client, address)
        client.load_collection(self._name, timeout=CALL_SECONDS)
        kept = client.get(self._name, ids=[MANIFEST], output_fields=["about"], timeout=CALL_SECONDS)
        if not kept:
            raise Unfinished(f"{address} is unfinished: run the command that makes it again")
        try:
            self.manifest = read_manifest(kept[0]["about"])
        except pydantic.ValidationError:
            raise ValueError(f"{address} was made by another version: choose another collection") from None
        if width != self.manifest.width:
            raise ValueError(
                f"{address}: its vectors have {width} dimensions, those of {self.manifest.encoder} "
                f"{self.manifest.width}; choose another collection"
            )
        self.rows = self.manifest.rows
        self._vectors = np.empty((self.rows, width), np.float32)
        self._fetched = np.zeros(self.rows, bool)
        counted = client.query(
            self._name, filter="row >= 0", output_fields=["count(*)"], timeout=CALL_SECONDS
        )
        if (held := counted[0]["count(*)"]) != self.rows:
            raise ValueError(
                f"{address} has {held:,} rows, not the {self.rows:,} that were written: drop the "
                "collection, and index again"
            )

    def top(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(scores float32[Q, K], rows int64[Q, K]) by inner product, the highest first."""
        found = [
            hits
            for start in range(0, len(queries), QUERIES)
            for hits in self._client.search(
                self._name,
                data=queries[start : start + QUERIES].tolist(),
                anns_field="vector",
                filter="row >= 0",
                limit=count,
                output_fields=["row"],
                search_params={"metric_type": "IP"},
                timeout=CALL_SECONDS,
            )
        ]
        scores = np.array([[hit["distance"] for hit in hits] for hits in found], np.float32)
        return scores, np.array([[hit["row"] for hit in hits] for hits in found], np.int64)

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """float32[K, D] of rows int64[K]; each is fetched once."""
        missing = rows[~self._fetched[rows]]
        step = max(1, MESSAGE // (4 * self._vectors.shape[1]))
        for start in range(0, len(missing), step):
            part = [int(row) for row in missing[start : start + step]]
            got = self._client.get(
                self._name, ids=part, output_fields=["row", "vector"], timeout=CALL_SECONDS
            )
            for record in got:
                self._vectors[record["row"]] = record["vector"]
            self._fetched[[record["row"] for record in got]] = True
        assert self._fetched[rows].all(), "Milvus found rows that it does not give"
        return self._vectors[rows]

    def about(self, rows: np.ndarray) -> list[str]:
        """The words on rows int64[K]."""
        found: dict[int, str] = {}
        for start in range(0, len(rows), WORDS):
            part = [int(row) for row in rows[start : start + WORDS]]
            got = self._client.get(self._name, ids=part, output_fields=["row", "about"], timeout=CALL_SECONDS)
            found |= {int(record["row"]): str(record["about"]) for record in got}
        return [found[int(row)] for row in rows]


def held(client: Any, address: Address, kind: type[Kind]) -> dict[str, Kind]:
    """Finished indexes of a kind by address: the one that it names, or all whose name says what they are.

    Raises ValueError where that is a collection of another kind.
    """
    found: dict[str, Kind] = {}
    names = client.list_collections(timeout=CALL_SECONDS)
    wanted = address.collection
    for name in sorted(n for n in names if (n == wanted if wanted else n.startswith(PREFIX))):
        one = replace(address, collection=name)
        try:
            manifest = Collection(client, one).manifest
            if not isinstance(manifest, kind):
                raise foreign(str(one), manifest, kind)
            found[str(one)] = manifest
        except Unfinished:
            continue
        except ValueError:
            if address.collection:
                raise
    return found


def foreign(where: str, found: Held, wanted: type[Held]) -> ValueError:
    """Of an index that another command made."""
    return ValueError(
        f"{where} holds an index of `{found.made_by}`, not one of `{wanted.made_by}`: name another place"
    )


def _width(client: Any, address: Address) -> int:
    fields = client.describe_collection(address.collection, timeout=CALL_SECONDS)["fields"]
    by_name = {field["name"]: field for field in fields}
    widths = [field["params"]["dim"] for field in fields if "dim" in field["params"]]
    if by_name.keys() != FIELDS:
        told = f", its vectors have {widths[0]} dimensions" if widths else ""
        raise ValueError(
            f"{address} was not made by flamingo (fields {', '.join(sorted(by_name))}{told}): "
            "choose another collection"
        )
    return int(by_name["vector"]["params"]["dim"])


def write(client: Any, address: Address, manifest: Held, vectors: np.ndarray, about: Sequence[str]) -> None:
    """A new collection; an unfinished or older one of ours under this name goes.

    vectors: float32[R, D]; about: a word on each row. Raises ValueError for a foreign collection.
    """
    from pymilvus import DataType, MilvusClient

    name = str(address.collection)
    if client.has_collection(name, timeout=CALL_SECONDS):
        _width(client, address)  # not if it is another's
        client.drop_collection(name, timeout=CALL_SECONDS)
    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("row", DataType.INT64, is_primary=True)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=vectors.shape[1])
    schema.add_field("about", DataType.VARCHAR, max_length=65_535)
    index = MilvusClient.prepare_index_params()
    index.add_index("vector", index_type="FLAT", metric_type="IP")
    client.create_collection(
        name, schema=schema, index_params=index, consistency_level="Strong", timeout=CALL_SECONDS
    )
    for rows in _batches(about, 4 * vectors.shape[1]):
        part = [{"row": row, "vector": vectors[row], "about": about[row]} for row in rows]
        client.insert(name, part, timeout=CALL_SECONDS)
    last = {"row": MANIFEST, "vector": np.zeros(vectors.shape[1], np.float32)}
    client.load_collection(name, timeout=CALL_SECONDS)
    client.insert(name, [{**last, "about": manifest.model_dump_json()}], timeout=CALL_SECONDS)


def _batches(about: Sequence[str], vector: int) -> Iterator[list[int]]:
    """Rows that are sent together: at most `MESSAGE` bytes of vectors and words, but for one row alone."""
    rows: list[int] = []
    size = 0
    for row, words in enumerate(about):
        if rows and size + vector + len(words) > MESSAGE:
            yield rows
            rows, size = [], 0
        rows.append(row)
        size += vector + len(words)
    if rows:
        yield rows

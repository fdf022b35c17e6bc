"""`flamingo clip embed` and `search`: an index of pictures or texts, and what of it is nearest to a query.

An index lies where those of RICES do (`flamingo.eval.retrieval`): a folder, searched with FAISS, or a
Milvus. One row for each content; what lies in several places is found with all of them.

R rows, D width of a vector.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flamingo.data.writing import write_aside
from flamingo.eval.clip import sources as given
from flamingo.eval.clip.sources import Entry, Found
from flamingo.eval.clip.vectors import Embedded, embedded
from flamingo.eval.embedding import PARTS, Encoder, Part, load
from flamingo.eval.retrieval.contents import NAMED, Catalogue, digest_of, library_versions
from flamingo.eval.retrieval.places import Place, place
from flamingo.eval.retrieval.search import PLACES, nearest
from flamingo.eval.vectors import Vectors

ROW_BYTES = 60_000  # of what is said of a row; a Milvus takes 65,535
SOURCES = 20  # that a manifest names


@dataclass(frozen=True)
class Hit:
    """score: cosine, to 6 decimals."""

    rank: int
    score: float
    id: str
    where: str
    caption: str


@dataclass(frozen=True)
class Made:
    """What `embed` made; bad: why other items cannot be read, by where they lie."""

    address: str
    catalogue: Catalogue
    bad: Mapping[str, str]


def embed(
    sources: Sequence[str],
    out: str,
    encoder: str,
    *,
    as_texts: bool = False,
    kind: str = "pairs",
    options: Mapping[str, Any] | None = None,
    rebuild: bool = False,
    max_bad: float = 0.5,
    npz: Path | None = None,
) -> Made:
    """Index pictures, or lines of text. What was computed before is kept by content: interrupted, it
    goes on; with more pictures, only those are computed.

    sources: as `sources.pictures` and `sources.texts` take them; out: a folder or a Milvus; encoder: as
    `embedding.load` takes it; npz: a file for ids and vectors.
    Raises ValueError for what cannot be read, and for an index of other things that is there, but with
    `rebuild`.
    """
    if as_texts and (kind != "pairs" or options):
        raise ValueError("--kind and --options say how pictures lie in shards: leave them out beside --texts")
    here = place(out)
    there = here.held(Catalogue)  # first: a Milvus that is down costs no encoder
    if npz is not None:
        npz.parent.mkdir(parents=True, exist_ok=True)
    part: Part = "text" if as_texts else "image"
    found = given.texts(sources) if as_texts else given.pictures(sources, kind, options or {}, here.kept)
    made = load(encoder)
    address = here.address("clip", part, made.name)
    held = there.get(address)
    if held is not None and not rebuild:
        _check_replaceable(here, address, held, made, part, found)
    done = embedded(found, made, part, Vectors(here.kept), max_bad)
    about = _about(done.entries)
    catalogue = Catalogue(
        holds=part,
        encoder=made.name,
        weights={each: made.digest(each) for each in (PARTS["both"] if made.logits() else (part,))},
        items=len(done.entries),
        content=digest_of(about),
        sources=_named(sources),
        rows=len(about),
        width=done.vectors.shape[1],
        versions=library_versions(),
    )
    if held != catalogue:
        here.write(address, catalogue, about, done.vectors)
    if npz is not None:
        _export(npz, done)
    return Made(address, catalogue, done.bad)


def _named(sources: Sequence[str]) -> list[str]:
    more = [f"... and {len(sources) - SOURCES:,} more"] if len(sources) > SOURCES else []
    return [*sources[:SOURCES], *more]


def _check_replaceable(
    here: Place, address: str, held: Catalogue, encoder: Encoder, part: Part, found: Found
) -> None:
    """Raises ValueError unless the index there is an earlier state of the same: nothing goes of it but
    what is no longer anywhere."""
    said = [f"it holds {held.holds} vectors, not {part}"] if held.holds != part else []
    if changed := held.changed_weights(encoder):
        other = held.encoder != encoder.name
        said += [f"its encoder is {held.encoder}, not {encoder.name}"] if other else changed
    if not said:
        before = [item["where"] for row in here.about(address) for item in json.loads(row)["items"]]
        now = {entry.where for entry in found.entries} | found.bad.keys()
        files = {_file(where, part) for where in now}
        gone = [w for w in before if w not in now and _file(w, part) not in files and _is_there(w, part)]
        if gone:
            said.append(f"{len(gone):,} of its items are not among these, the first is {gone[0]}")
    if said:
        raise ValueError(
            f"{address} holds another index ({'; '.join(said)}): choose another --out, or --rebuild it"
        )


def _file(where: str, part: Part) -> str:
    """Of FILE:LINE, or SHARD#KEY."""
    return where.rpartition(":")[0] if part == "text" else where.partition("#")[0]


def _is_there(where: str, part: Part) -> bool:
    return "://" in where or Path(where).exists() or Path(_file(where, part)).exists()


def _about(entries: Sequence[Entry]) -> list[str]:
    """A line of JSON on each row: its key, how many items there are, and the first of them."""
    rows: dict[str, list[Entry]] = {}
    for entry in entries:
        rows.setdefault(entry.key, []).append(entry)
    return [_row(key, members) for key, members in rows.items()]


def _row(key: str, members: Sequence[Entry]) -> str:
    items = [{"id": e.id, "where": e.where, "caption": e.caption} for e in members[:NAMED]]
    while True:
        line = json.dumps({"key": key, "count": len(members), "items": items})
        if len(line) <= ROW_BYTES:
            return line
        if len(items) > 1:
            items = items[: len(items) // 2]
        else:
            items[0]["caption"] = items[0]["caption"][: len(items[0]["caption"]) // 2]


def _export(file: Path, done: Embedded) -> None:
    """ids, where, captions: str[N]; vectors: float32[N, D]."""
    columns = {
        name: np.array([getattr(e, name) for e in done.entries]) for name in ("id", "where", "caption")
    }
    ids, where, captions = columns.values()

    def fill(temporary: Path) -> None:
        with temporary.open("wb") as out:  # of a path numpy changes the ending
            np.savez(out, ids=ids, where=where, captions=captions, vectors=done.of_entries())

    write_aside(file, fill)


# ---- search ------------------------------------------------------------------------------------


def search(
    where: str, text: str | None, image: Path | None, top: int = 10, encoder: str | None = None
) -> list[Hit]:
    """The items nearest to a text, a picture, or the sum of both, the nearest first.

    encoder: None: the index's own.
    Raises ValueError for an index that is not there, another encoder, or a query that cannot be made.
    """
    if image is None and not (text or "").strip():
        raise ValueError("nothing is asked for: give a text, --image FILE, or both")
    here = place(where)
    address, held = _chosen(here, where)
    try:
        made = load(encoder or held.encoder)
    except ValueError as error:
        hint = "" if encoder else "; if it lies elsewhere now, say where with --encoder"
        raise ValueError(f"index {address}: its encoder cannot be loaded: {error}{hint}") from None
    said = held.changed_weights(made)
    if said and made.name != held.encoder:
        said = [f"it is of {held.encoder}, not {made.name}"]
    if said:
        raise ValueError(
            f"index {address} is of another encoder ({'; '.join(said)}): vectors of two encoders cannot be "
            "compared; leave --encoder out, or make the index again with flamingo clip embed"
        )
    query = _query(made, held, text, image)
    with here.backend(address, _kept(here, held)) as backend:
        (rows,) = nearest(backend, query, None, min(top, held.rows))
        order = np.array(rows, np.int64)
        scores = (backend.vectors(order).astype(np.float64) * query[0]).sum(1).round(PLACES)
        about = [json.loads(line) for line in backend.about(order)]
    pairs = [
        (score, item) for score, row in zip(scores.tolist(), about, strict=True) for item in row["items"]
    ]
    return [Hit(rank, score, **item) for rank, (score, item) in enumerate(pairs[:top], 1)]


def as_json(hit: Hit) -> str:
    return json.dumps(asdict(hit), ensure_ascii=False)


def _kept(here: Place, held: Catalogue) -> Any:
    """What loads the vectors of a folder's rows."""
    store, part = Vectors(here.kept), held.holds
    return lambda about: store.kept(part, held.weights[part], [json.loads(line)["key"] for line in about])


def _chosen(here: Place, where: str) -> tuple[str, Catalogue]:
    held = here.held(Catalogue)
    if not held:
        raise ValueError(
            f"index {where} is not there, or unfinished; make it: flamingo clip embed SOURCE --out {where}"
        )
    if len(held) > 1:
        raise ValueError(f"index {where} has several: name one of {', '.join(held)}")
    return held.popitem()


def _query(encoder: Encoder, held: Catalogue, text: str | None, image: Path | None) -> np.ndarray:
    """float32[1, D], of length 1."""
    asked: dict[Part, Any] = {}
    if image is not None:
        asked["image"] = image
    if text and text.strip():
        asked["text"] = text.strip()
    foreign = [part for part in asked if part != held.holds]
    if foreign and encoder.logits() is None:
        raise ValueError(
            f"{encoder.name} has no space that pictures and texts share, and the index holds {held.holds} "
            f"vectors: ask with {'--image' if held.holds == 'image' else 'a text'} alone, or embed with an "
            "encoder of open_clip"
        )
    total = sum(encoder.embed(part, [item]) for part, item in asked.items()).astype(np.float64)  # type: ignore
    return (total / np.linalg.norm(total)).astype(np.float32)

"""Demonstrations nearest to a query (RICES: Yang et al. 2022; Alayrac et al. 2022, appendix A.2).

An index lies in a folder, searched with FAISS, or in a Milvus (`places`). It says what it was made of
(`contents.Manifest`), and is refused once its data or its encoder is another. Vectors are kept by
content (`vectors.Vectors`): what is indexed again is only what is new.

D width of a vector.
"""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from flamingo.eval import benchmarks
from flamingo.eval.benchmarks import Example
from flamingo.eval.config import EvalConfig
from flamingo.eval.embedding import PARTS, Encoder, Own, load
from flamingo.eval.few_shot import sample
from flamingo.eval.retrieval.contents import Contents, Manifest
from flamingo.eval.retrieval.places import Place, place
from flamingo.eval.retrieval.search import nearest
from flamingo.eval.task import Task
from flamingo.eval.vectors import Vectors, picture_keys

MORE = 16  # neighbours beyond the most shots: some of them may not be fit to be shots


def build_index(
    benchmark: str,
    data: Path | None,
    out: str,
    encoder: str,
    similarity: str = "image",
    pool: int | None = 2048,
    rebuild: bool = False,
) -> tuple[str, Manifest]:
    """Index the demonstrations of a benchmark: (its address, what it holds). One that is there, of the
    same data and encoder, stays as it is; an interrupted one goes on.

    out: a folder or a Milvus (`milvus.Address`); encoder: as `embedding.load` takes it; similarity:
    image, text, or both, which serves all three; pool: as in EvalConfig; rebuild: replace an index of
    other data or another encoder.
    Raises ValueError for what cannot be read, and for an index of something else that is there.
    """
    if similarity not in PARTS:
        raise ValueError(f"similarity={similarity!r}: choose one of {', '.join(PARTS)}")
    here = place(out)
    name = _name(benchmark)
    # As a Task, so that the pool is the one that `flamingo eval run` draws from.
    split = benchmarks.load(benchmark).DEMONSTRATIONS
    asked = {"benchmark": benchmark, "data": data, "split": split, "pool": pool}
    demonstrations = Task.of(EvalConfig(**asked, shots=(1,), control_limit=0)).pool
    there = here.held(Manifest)  # first: a Milvus that is down costs no encoder
    made = load(encoder)
    address = here.address(name, similarity, made.name)
    held = there.get(address)
    keys = picture_keys(here.kept, (example.image for example in demonstrations))
    contents = Contents.of(demonstrations, keys, similarity)
    if held is not None:
        wanted = {"benchmark": name, "similarity": similarity, "encoder": made.name}
        said = [f"{k}={getattr(held, k)}, not {v}" for k, v in wanted.items() if getattr(held, k) != v]
        said = said or [*here.changed(held, contents), *held.changed_weights(made)]
        if not said:
            return address, held
        if not rebuild:
            raise ValueError(
                f"{address} holds another index ({'; '.join(said)}): choose another --out, or --rebuild it"
            )
    vectors = contents.vectors(Vectors(here.kept), made)
    manifest = Manifest.of(name, similarity, made, contents, vectors.shape[1])
    here.write(address, manifest, contents.about(), vectors, [each.id for each in demonstrations])
    return address, manifest


def neighbours(
    config: EvalConfig, task: Task, predictor: Any, rank: int, world: int
) -> Mapping[str, list[Example]]:
    """Of each query that this process answers, the demonstrations nearest to it, nearest first: the most
    shots + 16, where there are so many. Never one with the query's own picture.

    Without an index, the model's own encoder is used, and its vectors lie in the cache folder.
    Raises ValueError for an index that is not there, of another benchmark, similarity, data or encoder.
    """
    settings = [setting for setting in config.settings() if setting.examples_before]
    if not settings:
        return {}
    samples = [sample(task.queries, setting) for setting in settings]
    shares = [each[rank * len(each) // world : (rank + 1) * len(each) // world] for each in samples]
    queries, mine = _once(samples), _once(shares)
    here = place(config.index)
    keys = picture_keys(here.kept, (example.image for example in (*task.pool, *queries)))
    encoder: Encoder = Own("model", predictor.model, predictor.processor)
    address, similarity = "", config.similarity
    if config.index is not None:
        address, manifest = _chosen(here, config)
        similarity = manifest.similarity
        encoder = _checked(here, address, manifest, Contents.of(task.pool, keys, similarity), encoder, config)
        if rank == 0:
            _tell_versions(address, manifest)
    pool = Contents.of(task.pool, keys, similarity)
    asked, own = (Contents.of(examples, keys, config.similarity) for examples in (queries, mine))
    store = Vectors(here.kept, rank, world)
    vectors = asked.vectors(store, encoder, own.rows)
    if not mine:
        return {}
    need = max(setting.examples_before for setting in settings) + MORE
    groups = own.by_picture()  # queries with the same content and picture have the same neighbours
    pictures = [own.pictures[positions[0]] for _, positions in groups]
    with here.backend(address, lambda about: pool.vectors(store, encoder)) as backend:
        width = len(backend.vectors(np.array([0]))[0])
        wide = _as_indexed(vectors[[row for row, _ in groups]], config.similarity, similarity, width)
        found = nearest(backend, wide, pool.members, need, lambda q, p: pool.pictures[p] == pictures[q])
    return {
        mine[position].id: [task.pool[at] for at in positions]
        for (_, alike), positions in zip(groups, found, strict=True)
        for position in alike
    }


def _name(benchmark: str) -> str:
    """The same whether a benchmark is written easy-vqa, easy_vqa or as a module."""
    return benchmarks.load(benchmark).__name__.rpartition(".")[2]


def _once(lists: Iterable[Iterable[Example]]) -> list[Example]:
    return list({example.id: example for each in lists for example in each}.values())


def _chosen(here: Place, config: EvalConfig) -> tuple[str, Manifest]:
    """The index that serves a config. Raises ValueError where none does, or several do."""
    held, name, command = here.held(Manifest), _name(config.benchmark), _command(config)
    if not held:
        raise ValueError(f"index {config.index} is not there, or unfinished; make it: {command}")
    same = {address: each for address, each in held.items() if each.benchmark == name}
    if not same:
        others = ", ".join(sorted({each.benchmark for each in held.values()}))
        raise ValueError(f"index {config.index} is of {others}, not of {name}; make another: {command}")
    exact = {address: each for address, each in same.items() if each.similarity == config.similarity}
    serving = exact or {address: each for address, each in same.items() if each.similarity == "both"}
    if not serving:
        (first, *_) = same.values()
        raise ValueError(
            f"index {config.index} compares by {first.similarity}, not by similarity={config.similarity}; "
            f"make another: {command}"
        )
    if len(serving) > 1:
        raise ValueError(f"index {config.index} has several of {name}: name one of {', '.join(serving)}")
    return serving.popitem()


def _checked(
    here: Place, address: str, manifest: Manifest, pool: Contents, own: Encoder, config: EvalConfig
) -> Encoder:
    """The encoder of an index. Raises ValueError where its data or its encoder is another now."""
    said = here.changed(manifest, pool)
    encoder = own
    if not manifest.encoder.startswith("model:") or manifest.changed_weights(own):
        try:
            encoder = load(manifest.encoder)
            said += manifest.changed_weights(encoder)
        except ValueError as error:
            said.append(f"its encoder cannot be loaded: {error}")
    if said:
        raise ValueError(
            f"index {address} is of other data or another encoder ({'; '.join(said)}); "
            f"make it again: {_command(config, manifest)} --rebuild"
        )
    return encoder


def _command(config: EvalConfig, manifest: Manifest | None = None) -> str:
    """What makes the index of a config, with the encoder that it had."""
    words = ["flamingo", "eval", "index", config.benchmark, "--out", str(config.index)]
    words += ["--data", str(config.data)] if config.data else []
    words += ["--similarity", manifest.similarity if manifest else config.similarity]
    words += ["--pool", str(config.pool)] if config.pool else []
    return shlex.join([*words, "--encoder", manifest.encoder if manifest else "open_clip:ViT-B-32/openai"])


def _tell_versions(address: str, manifest: Manifest) -> None:
    now = {name: version(name) for name in manifest.versions}
    said = [f"{name} {was}, now {now[name]}" for name, was in manifest.versions.items() if was != now[name]]
    if said:
        print(
            f"{address} was made with {', '.join(said)}: pictures that are nearly as near may change places",
            file=sys.stderr,
        )


def _as_indexed(vectors: np.ndarray, asked: str, indexed: str, width: int) -> np.ndarray:
    """float32[Q, D] as they are compared: what an index of both has beside what is asked meets zeros.

    Raises ValueError for vectors of another width.
    """
    if asked != indexed:
        vectors = vectors * np.float32(math.sqrt(2))
        rest = np.zeros((len(vectors), max(0, width - vectors.shape[1])), np.float32)
        vectors = np.concatenate([vectors, rest] if asked == "image" else [rest, vectors], 1)
    if vectors.shape[1] != width:
        raise ValueError(
            f"the index has vectors of {width} dimensions, queries have {vectors.shape[1]}: index again"
        )
    return vectors

"""`flamingo data features`: run the frozen encoder once and keep its patch grids as shards.

One task per shard, as all tools of `flamingo.data.tools`. N pictures, G grid positions, E encoder
width, S pixels a side.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flamingo.config import FlamingoVisionConfig
from flamingo.data.document import Clip, Image
from flamingo.data.errors import BadSample
from flamingo.data.features import CARD, members
from flamingo.data.kinds import reader
from flamingo.data.shards import ShardSet
from flamingo.data.tools.executors import Executor, Outcome, Task
from flamingo.data.tools.outputs import claim, finish, finished
from flamingo.data.transforms import ImageTransform, decoding_for
from flamingo.data.writing import write_tar, write_text
from flamingo.folders import load_encoder
from flamingo.processing import FlamingoProcessor

CHUNK = 32  # pictures that the encoder takes at a time


@dataclass(frozen=True)
class _Work:
    """The argument of a task."""

    model: str
    shard: str | Path
    kind: str
    options: Mapping[str, Any]
    out: str
    name: str


def fingerprint(
    encoder: nn.Module, config: FlamingoVisionConfig, transform: ImageTransform
) -> dict[str, Any]:
    """What tells the grids of this encoder from those of another: pixels, weights, dtype."""
    digest = hashlib.sha256()
    for name, weight in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    dtype = next(encoder.parameters()).dtype
    return {
        "name": f"{config.source}:{config.name}",
        "image_size": transform.size,
        "mean": list(map(float, transform.mean)),
        "std": list(map(float, transform.std)),
        "resize": f"{transform.resize_mode} {transform.crop}",
        "dtype": str(dtype).removeprefix("torch."),
        "weights": digest.hexdigest()[:32],
    }


def write_features(
    model: Path,
    shards: Sequence[str],
    kind: str,
    options: Mapping[str, Any],
    out: Path,
    executor: Executor | None = None,
) -> Outcome:
    """Encode the pictures of every shard into a shard of `out`; of a shard, each picture once.

    Returns each feature shard's {"samples": pictures, "bad_samples": left out}. Shards that are
    there already, complete, stay as they are; features.json comes with the last one.

    Raises:
        ValueError: a folder without a model, shards that are not there, or `out` is of another run.
    """
    encoder, config = load_encoder(model)
    reader(kind, options)
    source = ShardSet(shards)
    told = {
        "encoder": fingerprint(encoder, config, _transform(model)),
        "shards": source.manifest,
        "kind": kind,
    }
    claim(out, {**told, "options": dict(options)})
    names = [f"features-{number:06d}.tar" for number in range(len(source.places))]
    tasks = [
        Task(name, _write, _Work(str(model), place, kind, dict(options), str(out), name))
        for name, place in zip(names, source.places, strict=True)
    ]
    outcome = _with_gpus(executor or Executor()).run(tasks, "encoding", gpus=1)
    if finish(out, names, told):
        write_text(out / CARD, json.dumps(told, indent=1) + "\n")
    return outcome


def _with_gpus(executor: Executor) -> Executor:
    """Where there are GPUs, one process for each."""
    if executor.name == "local" and executor.workers is None and torch.cuda.is_available():
        return replace(executor, workers=torch.cuda.device_count())
    return executor


def _write(work: _Work) -> dict[str, Any]:
    """The task: the grids of one shard, complete or absent."""
    source, read = ShardSet([work.shard], may_be_empty=True), reader(work.kind, work.options)
    encoder, transform = _opened(Path(work.model))
    seen: set[str] = set()
    bad = 0

    def pictures() -> Iterator[tuple[str, Tensor]]:
        nonlocal bad
        for sample in range(int(source.counts[0])):
            try:
                with decoding_for(transform.size):
                    document = read(source.read(0, sample), source.key(0, sample))
            except BadSample:
                bad += 1
                continue
            for image in _images(document.items):
                if image.key not in seen:
                    seen.add(image.key)
                    yield image.key, transform(image.image)

    def fill(path: Path) -> dict[str, Any]:
        with _one_thread():
            count = write_tar(path, members(_encoded(encoder, pictures())))
        return {"samples": count, "bad_samples": bad}

    return finished(Path(work.out), work.name, fill)


def _images(items: Sequence[Any]) -> Iterator[Image]:
    for item in items:
        if isinstance(item, Image):
            yield item
        elif isinstance(item, Clip):
            yield from item.frames


def _encoded(encoder: nn.Module, pictures: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """(key, float32[3, S, S]) -> (key, float[G, E])."""
    place = next(encoder.parameters())
    waiting: list[tuple[str, Tensor]] = []
    for picture in pictures:
        waiting.append(picture)
        if len(waiting) == CHUNK:
            yield from _encode(encoder, waiting, place)
            waiting = []
    if waiting:
        yield from _encode(encoder, waiting, place)


@torch.inference_mode()
def _encode(
    encoder: nn.Module, pictures: list[tuple[str, Tensor]], place: Tensor
) -> list[tuple[str, Tensor]]:
    pixels = torch.stack([pixels for _, pixels in pictures]).to(place.device, place.dtype)
    grids = encoder(pixels).cpu()
    return [(key, grid) for (key, _), grid in zip(pictures, grids, strict=True)]


@contextmanager
def _one_thread() -> Iterator[None]:
    """On a CPU the last bits depend on the number of threads: one, wherever a task runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@lru_cache(maxsize=1)
def _opened(folder: Path) -> tuple[nn.Module, ImageTransform]:
    encoder, _ = load_encoder(folder)
    return encoder.to(_device()), _transform(folder)


def _transform(folder: Path) -> ImageTransform:
    processor: Any = FlamingoProcessor.from_pretrained(folder)
    return processor.image_processor.transform


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    number = multiprocessing.current_process().name.rpartition("-")[2]  # SpawnProcess-2
    return torch.device("cuda", (int(number) if number.isdigit() else 0) % torch.cuda.device_count())

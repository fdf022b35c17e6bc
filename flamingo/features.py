"""`flamingo data features`: run the frozen encoder once and keep its patch grids as shards.

N pictures, G grid positions, E encoder width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flamingo.data.document import Clip, Image
from flamingo.data.errors import BadSample
from flamingo.data.features import CARD, members
from flamingo.data.kinds import reader
from flamingo.data.shards import ShardSet
from flamingo.data.transforms import decoding_for
from flamingo.data.writing import new_folder, write_tars
from flamingo.folders import check_model
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.processing import FlamingoProcessor

CHUNK = 32  # pictures that the encoder takes at a time


def fingerprint(model: FlamingoForConditionalGeneration) -> dict[str, Any]:
    """What tells the grids of this encoder from those of another: config, weights, dtype."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.vision_encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    vision: Any = model.config.vision_config
    dtype = next(model.vision_encoder.parameters()).dtype
    return {
        "name": f"{vision.source}:{vision.name}",
        "image_size": vision.image_size,
        "dtype": str(dtype).removeprefix("torch."),
        "weights": digest.hexdigest()[:32],
    }


def write_features(
    model: Path, shards: list[str], kind: str, options: dict[str, Any], out: Path, track=None
) -> dict[str, int]:
    """Encode every picture of the shards into `out`, which is complete or absent; each picture once.

    track(items, what, total): shows progress. Returns counts of pictures and bad samples.
    Raises ValueError for a folder without a model, shards that are not there, or an `out` that is.
    """
    check_model(model)
    loaded, processor = _load(model)
    source, read = ShardSet(shards), reader(kind, options)
    transform = processor.image_processor.transform  # type: ignore[attr-defined]
    if out.exists():
        raise ValueError(f"{out} is there already: choose another folder, or delete this one")
    seen: set[str] = set()
    counts = {"pictures": 0, "bad_samples": 0}

    def grids(shard: int) -> Iterator[tuple[str, Tensor]]:
        waiting: list[tuple[str, Tensor]] = []
        for sample in range(source.counts[shard]):
            try:
                with decoding_for(transform.size):
                    document = read(source.read(shard, sample), source.key(shard, sample))
            except BadSample:
                counts["bad_samples"] += 1
                continue
            for image in _pictures(document.items):
                if image.key not in seen:
                    seen.add(image.key)
                    waiting.append((image.key, transform(image.image)))
            while len(waiting) >= CHUNK:
                yield from _encode(loaded, waiting[:CHUNK])
                del waiting[:CHUNK]
        if waiting:
            yield from _encode(loaded, waiting)

    with new_folder(out) as folder:
        numbers = range(len(source.places))
        for shard in track(numbers, "shards", len(numbers)) if track else numbers:
            write_tars(folder, f"features-{shard:06d}", members(grids(shard)), 1 << 62)
        counts["pictures"] = len(seen)
        card = {"encoder": fingerprint(loaded), "shards": source.manifest, **counts}
        (folder / CARD).write_text(json.dumps(card, indent=1) + "\n")
    return counts


def _pictures(items) -> Iterator[Image]:
    for item in items:
        if isinstance(item, Image):
            yield item
        elif isinstance(item, Clip):
            yield from item.frames


@torch.inference_mode()
def _encode(
    model: FlamingoForConditionalGeneration, pictures: list[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    pixels = torch.stack([pixels for _, pixels in pictures]).to(model.device)
    grids = model.encode_images(pixels).cpu()
    return zip([key for key, _ in pictures], grids, strict=True)  # type: ignore[return-value]


@lru_cache(maxsize=1)
def _load(folder: Path) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    from flamingo.folders import load_model

    return load_model(folder), FlamingoProcessor.from_pretrained(folder)

"""The micro-batch that a plan counts with: every document as long as its source allows.

B documents, T tokens, K <image> tokens, N pictures, S pixels a side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flamingo.config import FlamingoConfig
from flamingo.data.batch import IGNORE, Batch
from flamingo.data.config import SourceConfig
from flamingo.data.kinds import load_kind, longest_clip, reader
from flamingo.train.config import Recipe

# Where neither the source's kind nor the user says how many pictures a document has: as many as
# in the documents of Flamingo's M3W, 5 in 256 tokens (Alayrac et al. 2022, appendix A.3.2).
TOKENS_PER_IMAGE = 51


@dataclass(frozen=True)
class Held:
    """What a step holds, of all sources and ranks: arguments of `flops.step_flops`."""

    tokens: int
    targets: int
    pairs: int
    images: int
    places: int
    pictures: int


def images_per_document(source: SourceConfig, given: Mapping[str, int]) -> int:
    """<image> tokens of a document: as given for the source, or what its kind lets through at most."""
    if source.name in given:
        return given[source.name]
    options: Any = getattr(reader(source.kind, source.options), "keywords", {}).get("options")
    usual = max(1, source.max_tokens // TOKENS_PER_IMAGE)
    if source.kind in ("pairs", "video") or getattr(options, "image_per_turn", None) is False:
        return 1
    return min(usual, getattr(options, "max_images", usual))


def check_images(recipe: Recipe, given: Mapping[str, int]) -> None:
    """Raises ValueError for images of a source that is not there, or more than there is room for."""
    rooms = {source.name: source.max_tokens for source in recipe.sources}
    for name, images in given.items():
        if name not in rooms:
            raise ValueError(f"--images {name}={images}: no such source; there are {', '.join(rooms)}")
        if not 0 <= images < rooms[name]:
            raise ValueError(
                f"--images {name}={images}: a document has {rooms[name]} tokens (max_tokens of the source), "
                "every image is one of them"
            )


def splits(recipe: Recipe, gpus: int) -> list[int]:
    """Values of `accumulation` that divide the batches, falling: the smallest micro-batch first.

    Raises ValueError where the ranks do not divide a batch.
    """
    uneven = [f"{source.name} ({source.batch})" for source in recipe.sources if source.batch % gpus]
    if uneven:
        raise ValueError(
            f"{gpus} ranks do not divide the batch of {', '.join(uneven)}: choose --gpus or "
            "sources.NAME.batch so that they do"
        )
    common = math.gcd(*(source.batch for source in recipe.sources)) // gpus
    return [parts for parts in range(common, 0, -1) if common % parts == 0]


def held_by_step(
    recipe: Recipe, config: FlamingoConfig, given: Mapping[str, int], image_tokens: int = 1
) -> Held:
    """What a step holds when every source has joined and every document has all its tokens.

    image_tokens: that the LM reads for each <image> token.
    """
    vision: Any = config.vision_config
    tokens = targets = pairs = images = pictures = 0
    for source in recipe.sources:
        each = images_per_document(source, given)
        tokens += source.batch * source.max_tokens
        pairs += source.batch * (source.max_tokens + each * (image_tokens - 1)) ** 2
        images += source.batch * each
        pictures += source.batch * each * longest_clip(source.kind, source.options)
        targets += source.batch * (source.max_tokens - max(1, each))
    places = pictures * vision.grid[0] * vision.grid[1]
    return Held(tokens, targets, pairs, images, places, 0 if recipe.features else pictures)


def micro_batch(
    source: SourceConfig,
    documents: int,
    images: int,
    config: FlamingoConfig,
    stored: bool,
    fake: FakeTensorMode,
) -> Batch:
    """One source's share of a micro-batch: real ids, pictures without pixels. An image begins each of
    the document's equal parts; everything else is learned.

    stored: the grids are on disk, no picture is encoded.
    """
    load_kind(source.kind)
    vision: Any = config.vision_config
    length, frames = source.max_tokens, longest_clip(source.kind, source.options)
    ids = torch.ones(documents, length, dtype=torch.int64)
    starts = torch.arange(images) * length // max(1, images)
    ids[:, starts] = config.image_token_id
    ids[:, -1] = config.end_of_chunk_token_id
    labels = ids.masked_fill(ids == config.image_token_id, IGNORE)
    pictures = documents * images * frames
    with fake:
        pixels = torch.empty(0 if stored else pictures, 3, vision.image_size, vision.image_size)
    return Batch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        labels=labels,
        pixel_values=pixels,
        pixel_index=torch.full((pictures,), -1) if stored else torch.arange(pictures),
        image_keys=[f"{source.name} {number}" for number in range(pictures)],
        keys=[f"{source.name} {number}" for number in range(documents)],
        frames=torch.full((documents * images,), frames) if frames > 1 else None,
    )

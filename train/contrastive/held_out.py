"""Held-out retrieval: how often a picture finds its caption among all of them, and the reverse.

N pictures, C distinct captions, D width of a vector.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flamingo.data.errors import BadSample
from flamingo.data.kinds import reader
from flamingo.data.shards import ShardSet
from flamingo.data.transforms import decoding_for
from flamingo.train.contrastive.config import ValidationConfig
from flamingo.train.contrastive.data import numbers_of, picture_and_caption
from flamingo.train.contrastive.encoder import DualEncoder
from flamingo.train.engine import gather_objects

log = logging.getLogger(__name__)
ROWS = 1024  # pictures that are compared with all captions at a time

Encode = Callable[[Any], Tensor]  # a batch of this rank -> float[n, D], each of length 1


class Recall(NamedTuple):
    """Shares of first guesses that are right. chance: of a guess, the same in both directions."""

    image_to_text: float
    text_to_image: float
    chance: float


def recall(images: Tensor, texts: Tensor, owner: Tensor) -> Recall:
    """images: float[N, D]; texts: float[C, D], of distinct captions; owner: int64[N], whose caption is which.

    A caption has found its picture when the nearest is one of those that it describes. Guessing, a
    picture is right once in C; a caption as often as it is the pictures', which is 1 / C on average.
    """
    nearest_text, best = [], torch.full((len(texts),), -torch.inf)
    nearest_image = torch.zeros(len(texts), dtype=torch.int64)
    for start in range(0, len(images), ROWS):
        near = images[start : start + ROWS] @ texts.T
        nearest_text.append(near.argmax(1))
        value, number = near.max(0)
        nearest_image = torch.where(value > best, number + start, nearest_image)
        best = torch.maximum(value, best)
    right_text = torch.cat(nearest_text) == owner
    right_image = owner[nearest_image] == torch.arange(len(texts))
    return Recall(float(right_text.float().mean()), float(right_image.float().mean()), 1 / len(texts))


class HeldOut:
    """The pairs of some shards, each rank with every n-th of them.

    Raises ValueError where there are no such shards, or they hold no pair.
    """

    def __init__(self, settings: ValidationConfig, encoder: DualEncoder, rank: int, world: int):
        self.settings, self.rank, self.world = settings, rank, world
        self.transform, self.texts = encoder.transform, encoder.texts
        try:
            self.shards = ShardSet(settings.shards, remote=settings.remote)
        except ValueError as error:
            raise ValueError(f"validation: {error}") from error
        counts = enumerate(self.shards.counts.tolist())
        places = [(shard, sample) for shard, count in counts for sample in range(count)]
        self.places = places[: settings.limit][rank::world]
        self.read = reader("pairs", {})
        self.told = False

    def __call__(self, image: Encode, text: Encode) -> dict[str, float]:
        """All ranks call, and get the same. image: float[n, 3, S, S] -> features; text: int64[n, L] -> them.

        Raises ValueError when none of the pairs can be used.
        """
        vectors, captions, bad = self._images(image)
        parts = gather_objects((vectors, captions, bad))
        every = [caption for part in parts for caption in part[1]]
        if not every:
            raise ValueError(f"validation.shards={self.settings.shards}: none of their pairs can be used")
        images = torch.cat([part[0] for part in parts if len(part[0])])
        distinct, owner = self._distinct(every)
        scores = recall(images, self._texts(text, distinct, images.shape[1]), owner)
        left_out = sum(part[2] for part in parts)
        return {**scores._asdict(), "pictures": len(every), "captions": len(distinct), "left_out": left_out}

    def _images(self, encode: Encode) -> tuple[Tensor, list[str], int]:
        """Features of this rank's pictures, their captions, and how many could not be read."""
        found, captions, bad = [], [], 0
        for start in range(0, len(self.places), self.settings.batch):
            pixels = []
            for shard, sample in self.places[start : start + self.settings.batch]:
                key = f"validation/{self.shards.names[shard]}/{self.shards.key(shard, sample)}"
                try:
                    with decoding_for(self.transform.size):
                        document = self.read(self.shards.read(shard, sample), key)
                except BadSample as error:
                    bad += 1
                    if not self.told:  # each time they are read
                        log.warning("left out bad sample %s: %s", key, error)
                    continue
                picture, caption = picture_and_caption(document)
                pixels.append(self.transform(picture.image))
                captions.append(caption)
            if pixels:
                found.append(encode(torch.stack(pixels)))
        self.told = True
        return torch.cat(found) if found else torch.zeros(0, 0), captions, bad

    def _distinct(self, captions: list[str]) -> tuple[list[str], Tensor]:
        """Captions that the tokenizer tells apart, as they come first, and int64[N] which is whose."""
        numbers = numbers_of(self.texts(captions)).tolist()
        first: dict[int, int] = {}
        distinct = []
        for number, caption in zip(numbers, captions, strict=True):
            if number not in first:
                first[number] = len(distinct)
                distinct.append(caption)
        return distinct, torch.tensor([first[number] for number in numbers])

    def _texts(self, encode: Encode, captions: list[str], width: int) -> Tensor:
        """Features of all captions, of which each rank encodes every n-th."""
        own = captions[self.rank :: self.world]
        step = self.settings.batch
        parts = [encode(self.texts(own[start : start + step])) for start in range(0, len(own), step)]
        found = torch.zeros(len(captions), width)
        for rank, part in enumerate(gather_objects(torch.cat(parts) if parts else None)):
            if part is not None:
                found[rank :: self.world] = part
        return found

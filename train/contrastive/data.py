"""Position -> pairs: this rank's part of a step, in an order that knows of no ranks.

b pairs of this rank, S pixels of a side, L tokens of a caption.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from flamingo.data.document import Document, Image, Text
from flamingo.data.draws import draw
from flamingo.data.errors import Skipped
from flamingo.data.steps import part_of_step
from flamingo.data.stream import Stream
from flamingo.data.transforms import ImageTransform

Tokenize = Callable[[list[str]], Tensor]  # texts -> int64[N, L]


class PairBatch(NamedTuple):
    """captions: equal numbers mean equal texts, as the tokenizer reads them."""

    pixel_values: Tensor  # float32[b, 3, S, S]
    input_ids: Tensor  # int64[b, L]
    captions: Tensor  # int64[b]
    skipped: list[Skipped]


class Pairs(Dataset[PairBatch]):
    """pairs[step] -> this rank's pairs of a step.

    batch: over all ranks. Raises ValueError for one that the ranks do not divide.
    """

    def __init__(
        self,
        stream: Stream,
        transform: ImageTransform,
        tokenize: Tokenize,
        batch: int,
        rank: int = 0,
        world: int = 1,
    ):
        if batch % world:
            below = batch - batch % world
            near = f"{below} or {below + world}" if below else str(world)
            raise ValueError(
                f"data.batch={batch} cannot be divided by {world} ranks: set it to {near}, or give another "
                "number of --processes"
            )
        self.stream, self.transform, self.tokenize = stream, transform, tokenize
        self.batch, self.rank, self.world = batch, rank, world

    def __getitem__(self, step: int) -> PairBatch:
        read = [self.stream.read(p) for p in part_of_step(step, self.batch, self.rank, self.world)]
        pairs = [picture_and_caption(document) for document, _ in read]
        ids = self.tokenize([caption for _, caption in pairs])
        return PairBatch(
            torch.stack([self.transform(picture.image) for picture, _ in pairs]),
            ids,
            numbers_of(ids),
            [bad for _, skipped in read for bad in skipped],
        )


def picture_and_caption(document: Document) -> tuple[Image, str]:
    """What a document of the kind `pairs` holds."""
    picture, text = document.items
    assert isinstance(picture, Image) and isinstance(text, Text)
    return picture, text.text


def numbers_of(ids: Tensor) -> Tensor:
    """int64[N, L] tokens -> int64[N]: the same number for the same tokens, on every rank."""
    return torch.tensor([draw(*row) >> 1 for row in ids.tolist()])

"""The mixture that `benchmarks.train` trains on: caption pairs and interleaved documents, made in code.

Every picture is noise and mirror-symmetric, so that OpenFlamingo's random flips show the same
picture and both sides learn from the same pixels.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import PIL.Image

from flamingo.data.document import Document, Image, Text, content_key

CAPTION_WORDS = (5, 25)
DOCUMENT_WORDS = (40, 200)
DOCUMENT_IMAGES = (1, 6)
# One token each in a usual BPE vocabulary, so that the lengths are those that the issue names.
TEXT = (
    "the a of and to in is on with for was that by at from this his her it as one two three old new "
    "small large red blue green white black dog cat man woman child house tree river road car boat "
    "street table window water sky stone bread horse bird field garden church bridge town day night "
    "morning stands runs looks walks holds near under over behind between long short first last good"
)
WORDS = TEXT.split()


@dataclass(frozen=True)
class Sample:
    """Pictures, as PNG files, each followed by its text."""

    pictures: tuple[bytes, ...]
    texts: tuple[str, ...]

    def document(self, key: str) -> Document:
        """The same as the data room has it."""
        items = []
        for data, text in zip(self.pictures, self.texts, strict=True):
            picture = PIL.Image.open(io.BytesIO(data)).convert("RGB")
            items += [Image(picture, content_key(data)), Text(text)]
        return Document(tuple(items), key)


@dataclass(frozen=True)
class Step:
    """The samples of one optimizer step."""

    captions: tuple[Sample, ...]
    documents: tuple[Sample, ...]

    def __len__(self) -> int:
        return len(self.captions) + len(self.documents)


def steps(seed: int, captions: int, documents: int, side: int) -> Iterator[Step]:
    """Steps of so many captions and documents, without end; side: of the pictures in pixels."""
    draw = random.Random(seed)
    while True:
        yield Step(
            tuple(_sample(draw, 1, draw.randint(*CAPTION_WORDS), side) for _ in range(captions)),
            tuple(
                _sample(draw, draw.randint(*DOCUMENT_IMAGES), draw.randint(*DOCUMENT_WORDS), side)
                for _ in range(documents)
            ),
        )


def _sample(draw: random.Random, images: int, words: int, side: int) -> Sample:
    """`words` words cut into one piece after each of the images, none empty."""
    text = draw.choices(WORDS, k=words)
    cuts = [0, *sorted(draw.sample(range(1, words), images - 1)), words]
    pieces = tuple(" ".join(text[a:b]) for a, b in zip(cuts, cuts[1:], strict=False))
    return Sample(tuple(_picture(draw.getrandbits(32), side) for _ in pieces), pieces)


def _picture(seed: int, side: int) -> bytes:
    half = np.random.default_rng(seed).integers(0, 256, (side, side // 2, 3), dtype=np.uint8)
    out = io.BytesIO()
    PIL.Image.fromarray(np.concatenate((half, half[:, ::-1]), axis=1)).save(out, "PNG", compress_level=1)
    return out.getvalue()

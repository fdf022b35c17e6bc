"""The one in-memory form of training data: an ordered list of text, images and clips."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import PIL.Image


@dataclass(frozen=True)
class Text:
    """A piece of text that is tokenised on its own.

    With `loss=False` the model reads it but is not trained to say it (a question, a prompt).
    """

    text: str
    loss: bool = True


@dataclass(frozen=True, eq=False)
class Image:
    """A decoded RGB picture.

    `key` is `content_key` of its encoded bytes: the same picture has the same key in whatever
    sample, shard or source it lies, so a cache of frozen features encodes it once.
    """

    image: PIL.Image.Image
    key: str


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames of a video in the order of time, at least one; it is one <image> token."""

    frames: tuple[Image, ...]


Item = Text | Image | Clip


@dataclass(frozen=True)
class Document:
    """Items in reading order. A caption pair is the short case: one image, one text.

    `key` is "source/shard/sample": enough to find the sample again. `seed` is drawn from the
    position in the source: whatever is random about a document (where it is cut, how its pictures
    are cropped) follows from it.
    """

    items: tuple[Item, ...]
    key: str
    seed: int = 0


def content_key(data: bytes) -> str:
    """Encoded picture -> 32 hexadecimal digits that identify its bytes."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()

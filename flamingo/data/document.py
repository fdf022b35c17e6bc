"""The one in-memory form of training data: an ordered list of text and images."""

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


Item = Text | Image


@dataclass(frozen=True)
class Document:
    """Items in reading order. A caption pair is the short case: one image, one text.

    `key` is "source/shard/sample": enough to find the sample again.
    """

    items: tuple[Item, ...]
    key: str


def content_key(data: bytes) -> str:
    """Encoded picture -> 32 hexadecimal digits that identify its bytes."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()

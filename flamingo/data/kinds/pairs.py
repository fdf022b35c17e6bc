"""One picture and its caption: KEY.jpg (jpeg, png, webp) with KEY.txt or KEY.json.

The layout of LAION, CC3M and img2dataset. With both, the text file is the caption and the json is
metadata; alone, the json holds it under "caption" or "text".
"""

from __future__ import annotations

from collections.abc import Mapping

from flamingo.data.document import Document, Text
from flamingo.data.kinds import _members

IMAGES = _members.PICTURES


def read(sample: Mapping[str, bytes], key: str) -> Document:
    """The document (image, caption); see the package docstring for the contract."""
    name = _members.one_of(sample, IMAGES, "image")
    caption = _members.caption(sample)
    return Document((_members.image(sample[name]), Text(caption)), key)


def example() -> dict[str, bytes]:
    return {"png": _members.example_png(), "txt": b"A photo of a blue square"}

"""OBELICS as published (Laurencon et al. 2023, section 3): a web page as two parallel lists.

    KEY.json     {"texts": [null, "A blue square.", null], "images": ["https://...", null, "..."]}
    KEY.0.jpg    the image of entry 0, ...

Of each entry exactly one is null. An image is the member that it names; or base64 as a data:
address; or else the member called by the number of its entry, as `flamingo data convert obelics`
writes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field

from flamingo.data.document import Document, Item, Text
from flamingo.data.errors import BadSample
from flamingo.data.kinds import _members


class Options(BaseModel):
    """Which images are kept."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_side: int = Field(default=1, ge=1, description="Pixels of the shorter side, at least.")
    max_images: int = Field(
        default=30, ge=1, description="Images of a document; those that come first are kept."
    )


def read(sample: Mapping[str, bytes], key: str, options: Options = Options()) -> Document:  # noqa: B008
    """The document in the order of the lists; see the package docstring for the contract."""
    fields = _members.json_object(_members.member(sample, "json"))
    texts, images = fields.get("texts"), fields.get("images")
    if not isinstance(texts, list) or not isinstance(images, list) or len(texts) != len(images):
        raise BadSample("bad json", "'texts' and 'images' must be lists of the same length")
    items: list[Item] = []
    kept = 0
    for number, (text, image) in enumerate(zip(texts, images, strict=True)):
        if (text is None) == (image is None):
            raise BadSample("bad json", f"entry {number}: exactly one of text and image must be null")
        if text is not None:
            if words := _members.text(text, f"text {number}").strip():
                items.append(Text(words))
            continue
        data = _bytes(sample, number, image)
        if min(_members.size(data)) >= options.min_side and kept < options.max_images:
            items.append(_members.image(data))
            kept += 1
    if not kept:
        raise BadSample("no image", f"none of {len(images) - images.count(None)} images is large enough")
    if not any(isinstance(item, Text) for item in items):
        raise BadSample("no text", "all texts are empty")
    return Document(_joined(items), key)


def _joined(items: list[Item]) -> tuple[Item, ...]:
    """Texts that follow each other, where an image between them fell out, become one."""
    joined: list[Item] = []
    for item in items:
        if isinstance(item, Text) and joined and isinstance(joined[-1], Text):
            joined[-1] = Text(f"{joined[-1].text}\n\n{item.text}")
        else:
            joined.append(item)
    return tuple(joined)


def _bytes(sample: Mapping[str, bytes], number: int, image: object) -> bytes:
    name = _members.text(image, f"image {number}")
    if name.startswith("data:"):
        return _members.from_base64(name)
    numbered = [f"{number}.{ending}" for ending in _members.PICTURES]
    found = next((member for member in (name.lower(), *numbered) if member in sample), numbered[0])
    return _members.member(sample, found)


def example() -> dict[str, bytes]:
    page = {"texts": [None, "A blue square."], "images": ["https://example.com/blue.png", None]}
    return {"json": json.dumps(page).encode(), "0.png": _members.example_png()}

"""Our own format for interleaved documents: KEY.json that names image members of the same sample.

    000001.json   {"items": [{"image": "0.png"},
                             {"text": "Question: what color is it? Answer:", "loss": false},
                             {"text": " blue"}]}
    000001.0.png

"loss" is true unless it is given. Other fields are free for metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from flamingo.data.document import Document, Image, Item, Text
from flamingo.data.errors import BadSample
from flamingo.data.kinds import _members


def read(sample: Mapping[str, bytes], key: str) -> Document:
    """The document in the order of "items"; see the package docstring for the contract."""
    listed = _members.json_object(_members.member(sample, "json")).get("items")
    if not isinstance(listed, list):
        raise BadSample("bad json", f"'items' must be a list, not {type(listed).__name__}")
    images: dict[str, Image] = {}  # a picture that is shown twice is decoded once
    items = tuple(_item(entry, sample, images) for entry in listed)
    if not any(isinstance(item, Text) and item.loss and item.text.strip() for item in items):
        raise BadSample("no text", "nothing to learn: no text with loss")
    return Document(items, key)


def _item(entry: Any, sample: Mapping[str, bytes], images: dict[str, Image]) -> Item:
    if not isinstance(entry, dict) or ("image" in entry) == ("text" in entry):
        raise BadSample("bad json", f"an item has either 'image' or 'text': {str(entry)[:80]}")
    if "text" in entry:
        loss = entry.get("loss", True)
        if not isinstance(loss, bool):
            raise BadSample("bad json", f"'loss' must be true or false, not {str(loss)[:80]}")
        return Text(_members.text(entry["text"], "item 'text'"), loss)
    name = _members.text(entry["image"], "item 'image'")
    if name not in images:
        images[name] = _members.image(_members.member(sample, name))
    return images[name]


def example() -> dict[str, bytes]:
    items = [
        {"image": "0.png"},
        {"text": "Question: what color is it? Answer:", "loss": False},
        {"text": " blue"},
        {"image": "1.png"},
        {"text": "Question: and this? Answer:", "loss": False},
        {"text": " red"},
    ]
    return {
        "json": json.dumps({"items": items}).encode(),
        "0.png": _members.example_png("blue"),
        "1.png": _members.example_png("red"),
    }

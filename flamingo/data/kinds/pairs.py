"""One picture and its caption: KEY.jpg (jpeg, png, webp) with KEY.txt or KEY.json.

The layout of LAION, CC3M and img2dataset. With both, the text file is the caption and the json is
metadata; alone, the json holds it under "caption" or "text".
"""

from __future__ import annotations

from collections.abc import Mapping

from flamingo.data.document import Document, Text
from flamingo.data.errors import BadSample
from flamingo.data.kinds import _members

IMAGES = ("jpg", "jpeg", "png", "webp")


def read(sample: Mapping[str, bytes], key: str) -> Document:
    """The document (image, caption); see the package docstring for the contract."""
    found = [name for name in IMAGES if name in sample]
    if len(found) != 1:
        held = ", ".join(sorted(sample)) or "nothing"
        raise BadSample(
            "missing member" if not found else "too many images",
            f"a pair has exactly one of {', '.join(IMAGES)}; the sample holds {held}",
        )
    caption = _caption(sample).strip()
    if not caption:
        raise BadSample("no text", "the caption is empty")
    return Document((_members.image(sample[found[0]]), Text(caption)), key)


def _caption(sample: Mapping[str, bytes]) -> str:
    if "txt" in sample:
        return _members.text(sample["txt"], "txt")
    fields = _members.json_object(_members.member(sample, "json"))
    for name in ("caption", "text"):
        if name in fields:
            return _members.text(fields[name], f"json field {name!r}")
    raise BadSample("no text", "no txt member, and the json has neither 'caption' nor 'text'")


def example() -> dict[str, bytes]:
    return {"png": _members.example_png(), "txt": b"A photo of a blue square"}

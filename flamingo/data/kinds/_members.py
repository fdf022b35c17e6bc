"""What every kind needs: members of a sample, checked. All raise BadSample only."""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import PIL.Image

from flamingo.data.document import Image, content_key
from flamingo.data.errors import BadSample
from flamingo.data.transforms import FORMATS, decode_image, needs_pixels

PICTURES = ("jpg", "jpeg", "png", "webp")  # endings of image members


def member(sample: Mapping[str, bytes], name: str) -> bytes:
    """Bytes of the member called `name`, in any case of letters."""
    try:
        return sample[name.lower()]
    except KeyError:
        held = ", ".join(sorted(sample)) or "nothing"
        raise BadSample("missing member", f"no {name!r}; the sample holds {held}") from None


def image(data: bytes) -> Image:
    """The decoded picture; one of a pixel where its features are there already (`decoding_for`)."""
    key = content_key(data)
    return Image(decode_image(data) if needs_pixels(key) else PIL.Image.new("RGB", (1, 1)), key)


def size(data: bytes) -> tuple[int, int]:
    """Width and height in pixels, from the header: true also where `image` gives a smaller one."""
    try:
        with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as header:
            return header.size
    except PIL.Image.DecompressionBombError as error:
        raise BadSample("too large image", str(error)) from error
    except Exception as error:  # decoders raise whatever they like on damaged bytes
        raise BadSample("damaged image", f"{len(data)} bytes: {error!r}") from error


def one_of(sample: Mapping[str, bytes], endings: Sequence[str], what: str) -> str:
    """The name of the only member of the sample with one of these endings."""
    found = [name for name in endings if name in sample]
    if len(found) == 1:
        return found[0]
    held = ", ".join(sorted(sample)) or "nothing"
    raise BadSample(
        "missing member" if not found else f"too many {what}s",
        f"a sample has exactly one of {', '.join(endings)}; this one holds {held}",
    )


def caption(sample: Mapping[str, bytes]) -> str:
    """The text member, or "caption" or "text" of the json; not blank."""
    if "txt" in sample:
        found = text(sample["txt"], "txt")
    else:
        fields = json_object(member(sample, "json"))
        name = next((name for name in ("caption", "text") if name in fields), None)
        if name is None:
            raise BadSample("no text", "no txt member, and the json has neither 'caption' nor 'text'")
        found = text(fields[name], f"json field {name!r}")
    if not found.strip():
        raise BadSample("no text", "the caption is empty")
    return found.strip()


def from_base64(value: object) -> bytes:
    """base64 text, also as a data: address -> bytes."""
    try:
        return base64.b64decode(text(value, "base64").rpartition(",")[2], validate=True)
    except (binascii.Error, ValueError) as error:
        if isinstance(error, BadSample):
            raise
        raise BadSample("bad base64", str(error)) from None


def text(value: object, what: str) -> str:
    """`value` if it is text that a tokenizer takes; str or UTF-8 bytes."""
    try:
        if isinstance(value, bytes):
            return value.decode("utf-8-sig")
        if isinstance(value, str):
            value.encode("utf-8")  # JSON can spell lone surrogates, which no tokenizer takes
            return value
    except UnicodeError as error:
        raise BadSample("bad text", f"{what} is not UTF-8: {error}") from error
    raise BadSample("bad text", f"{what} must be a text, not {type(value).__name__}")


def json_object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample("bad json", str(error)) from error
    if not isinstance(value, dict):
        raise BadSample("bad json", f"must be an object, not {type(value).__name__}")
    return value


def example_png(color: str | tuple[int, int, int] = "blue") -> bytes:
    """A small picture for `example()`."""
    file = io.BytesIO()
    PIL.Image.new("RGB", (8, 8), color).save(file, "PNG")
    return file.getvalue()

"""What every kind needs: members of a sample, checked. All raise BadSample only."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import PIL.Image

from flamingo.data.document import Image, content_key
from flamingo.data.errors import BadSample
from flamingo.data.transforms import decode_image, needs_pixels


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

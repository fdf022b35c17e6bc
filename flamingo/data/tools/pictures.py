"""Encoded pictures of rows: bytes, base64, or files of one folder; never from outside of it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flamingo.data.errors import BadSample
from flamingo.data.kinds._members import from_base64 as from_base64

_MAGIC = (("jpg", 0, b"\xff\xd8\xff"), ("png", 0, b"\x89PNG\r\n\x1a\n"), ("webp", 8, b"WEBP"))
_ENDINGS = ("", ".jpg", ".jpeg", ".png", ".webp")


def ending(data: bytes) -> str:
    """ "jpg", "png" or "webp", as the first bytes say.

    Raises:
        BadSample: none of these.
    """
    for name, at, magic in _MAGIC:
        if data[at : at + len(magic)] == magic:
            return name
    raise BadSample("not a picture", f"{len(data)} bytes that begin {data[:8]!r}: must be JPEG, PNG or WebP")


def inside(root: Path, name: str) -> Path:
    """The file `name` of the folder `root`.

    Raises:
        BadSample: not there, or not inside of the folder (links are followed before asking).
    """
    path = os.path.realpath(root / name)
    if os.path.commonpath([os.path.realpath(root), path]) != os.path.realpath(root):
        raise BadSample("path outside", f"{name!r} leads out of {root}: set --image-root to its folder")
    if "\0" in name or not os.path.isfile(path):
        raise BadSample("missing picture", f"{name!r} is not in {root}")
    return Path(path)


def picture(value: Any, root: Path) -> bytes:
    """Bytes, a struct of `bytes` and `path`, a data: address, or a path within `root` -> its bytes.

    Raises:
        BadSample: there is none.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if not isinstance(value, str) or not value:
        raise BadSample("missing picture", f"neither bytes nor a path: {str(value)[:80]!r}")
    return from_base64(value) if value.startswith("data:") else inside(root, value).read_bytes()


def find(name: str, root: Path) -> bytes | None:
    """The picture that a published document names, None if the folder does not hold it.

    A path within the folder; of an address, a file named by its SHA-256 or MD5 in hexadecimal
    digits, with one of the usual endings. Raises BadSample for a path that leads out.
    """
    names = [name]
    if "://" in name:
        digests = (hashlib.sha256(name.encode()), hashlib.md5(name.encode(), usedforsecurity=False))
        names = [digest.hexdigest() + end for digest in digests for end in _ENDINGS]
    for candidate in names:
        try:
            return inside(root, candidate).read_bytes()
        except BadSample as error:
            if error.fault != "missing picture":
                raise
    return None

"""`flamingo data convert`: published mmc4 and OBELICS files, and their pictures, -> shards.

Pictures that could not be downloaded are taken out of a page, and pages without any are left out:
what is then in a shard is whole, and a picture that goes missing later is a fault.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flamingo.data.errors import BadSample
from flamingo.data.tools.pictures import ending, find, from_base64, picture
from flamingo.data.tools.tables import Row

_SAFE = re.compile(r"[A-Za-z0-9_-]+\.(jpg|jpeg|png|webp)")  # names that a member may keep
_GUESS = 50_000  # bytes of a picture that a page lists, for the size of shards


@dataclass(frozen=True)
class Mmc4Layout:
    """Rows with text_list, image_info and similarity_matrix. root: folder of pictures, or None."""

    root: str | None
    kind: str = "mmc4"

    def settings(self) -> dict[str, str]:
        return {"layout": "mmc4"}

    def columns(self) -> list[str]:
        return ["text_list", "image_info"]

    def members(self, row: Row) -> Mapping[str, bytes]:
        listed = _list(row, "image_info")
        _list(row, "text_list")
        kept, images = [], {}
        for number, info in enumerate(listed):
            if not isinstance(info, Mapping):
                raise BadSample("bad json", f"image_info {number} must be an object")
            data = self._bytes(info)
            if data is None:
                continue
            name = str(info.get("image_name") or "")
            if not _SAFE.fullmatch(name) or name.lower() in images:
                name = f"{number}.{ending(data)}"
            images[name.lower()] = data
            kept.append(
                (number, {**{k: v for k, v in info.items() if k != "image_base64"}, "image_name": name})
            )
        if not kept:
            raise BadSample("no image", f"none of {len(listed)} pictures is there")
        page = {**row, "image_info": [info for _, info in kept]}
        matrix = row.get("similarity_matrix")
        if isinstance(matrix, list) and len(matrix) == len(listed):
            page["similarity_matrix"] = [matrix[number] for number, _ in kept]
        return {"json": _json(page), **images}

    def _bytes(self, info: Mapping[str, Any]) -> bytes | None:
        if info.get("image_base64"):
            return from_base64(info["image_base64"])
        names = [info.get("image_name"), info.get("raw_url")]
        return _found(names, self.root)

    def weigh(self, row: Row) -> int:
        return len(str(row)) + _GUESS * len(row.get("image_info") or ())


@dataclass(frozen=True)
class ObelicsLayout:
    """Rows with parallel lists texts and images. root: folder of pictures, or None."""

    root: str | None
    kind: str = "obelics"

    def settings(self) -> dict[str, str]:
        return {"layout": "obelics"}

    def columns(self) -> list[str]:
        return ["texts", "images"]

    def members(self, row: Row) -> Mapping[str, bytes]:
        listed, texts = _list(row, "images"), _list(row, "texts")
        if len(listed) != len(texts):
            raise BadSample("bad json", "'texts' and 'images' must be lists of the same length")
        page: dict[str, list[Any]] = {"texts": [], "images": []}
        images = {}
        for text, image in zip(texts, listed, strict=True):
            data = None
            if image is not None:
                data = self._bytes(image)
                if data is None:
                    continue
                images[f"{len(page['images'])}.{ending(data)}"] = data
            page["texts"].append(text)
            page["images"].append(None if image is None else _address(image))
        if not images:
            raise BadSample("no image", f"none of {len(listed) - listed.count(None)} pictures is there")
        return {"json": _json({**row, **page}), **images}

    def _bytes(self, image: Any) -> bytes | None:
        if isinstance(image, str):
            return from_base64(image) if image.startswith("data:") else _found([image], self.root)
        if isinstance(image, Mapping) and not image.get("bytes"):
            return _found([image.get("path")], self.root)
        return picture(image, Path())

    def weigh(self, row: Row) -> int:
        return len(str(row.get("texts"))) + _GUESS * sum(i is not None for i in row.get("images") or ())


def _address(image: Any) -> str:
    """What the page keeps of an image: not the picture itself, which is a member."""
    return image if isinstance(image, str) and not image.startswith("data:") else ""


def _found(names: list[Any], root: str | None) -> bytes | None:
    if root is None:
        return None
    for name in names:
        if isinstance(name, str) and name and (data := find(name, Path(root))) is not None:
            return data
    return None


def _list(row: Row, name: str) -> list[Any]:
    value = row.get(name)
    if not isinstance(value, list):
        raise BadSample("bad json", f"{name!r} must be a list, not {type(value).__name__}")
    return value


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str).encode()

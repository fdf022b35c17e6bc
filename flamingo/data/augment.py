"""Random crops and mirror images of the pictures of a document, as a pure function of its seed."""

from __future__ import annotations

import math
from dataclasses import replace

import PIL.Image
import PIL.ImageOps

from flamingo.data.config import Augment
from flamingo.data.document import Clip, Document, Image, Item
from flamingo.data.draws import uniform

AUGMENTED = "@"  # in the key of a picture that was changed: the same one will not come again


def augment(document: Document, how: Augment) -> Document:
    """The document with every picture changed; all frames of a clip alike."""
    changed = (_item(document.seed, number, item, how) for number, item in enumerate(document.items))
    return replace(document, items=tuple(changed))


def _item(seed: int, number: int, item: Item, how: Augment) -> Item:
    if isinstance(item, Image):
        return _change(item, seed, number, how)
    if isinstance(item, Clip):
        return Clip(tuple(_change(frame, seed, number, how) for frame in item.frames))
    return item


def _change(image: Image, seed: int, number: int, how: Augment) -> Image:
    picture = image.image.crop(_box(image.image.size, seed, number, how))
    if uniform(0, 1, seed, number, "flip") < how.flip:
        picture = PIL.ImageOps.mirror(picture)
    return Image(picture, f"{image.key}{AUGMENTED}{seed:016x}.{number}")


def _box(size: tuple[int, int], seed: int, number: int, how: Augment) -> tuple[int, int, int, int]:
    """Left, upper, right, lower of a crop of the wanted area and shape (as in Inception's training)."""
    width, height = size
    area = width * height * uniform(*how.crop_scale, seed, number, "scale")
    narrow, wide = (math.log(ratio) for ratio in how.crop_ratio)
    ratio = math.exp(uniform(narrow, wide, seed, number, "ratio"))
    if how.crop_scale[0] == how.crop_scale[1] == 1:
        return (0, 0, width, height)
    across = min(width, max(1, round(math.sqrt(area * ratio))))
    down = min(height, max(1, round(math.sqrt(area / ratio))))
    left = int(uniform(0, width - across + 1, seed, number, "left"))
    upper = int(uniform(0, height - down + 1, seed, number, "upper"))
    return (left, upper, left + across, upper + down)

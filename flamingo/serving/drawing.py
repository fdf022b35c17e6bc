"""Where words looked, in characters or as a picture.

N pictures, h x w places of the encoder's grid, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
from einops import rearrange
from PIL.Image import Image
from torch import Tensor

from flamingo.looking import LookingWord

SHADES = " ░▒▓█"
GAP = "   "
CELL = 2  # characters a place: about as wide as high
LABEL = 16  # pixels above a picture
RED = (255, 40, 0)


def in_characters(words: Sequence[LookingWord], names: Sequence[str], columns: int = 80) -> str:
    """A grid per word and picture that it looked at, side by side as far as they fit; the darkest
    place is where it looked most."""
    blocks = []
    for word in words:
        for number, part in enumerate(word.maps):
            if float(part.sum()) > 0.005:
                share = f"{100 * float(part.sum()):.0f}%"
                blocks.append(_block(f"{word.word} · {number + 1} · {share}", part))
    if not blocks:
        return "no word looked at a picture"
    lines: list[str] = []
    row: list[list[str]] = []
    for block in blocks:
        if row and sum(len(b[0]) + len(GAP) for b in row) + len(block[0]) > columns:
            lines += [GAP.join(parts).rstrip() for parts in zip(*row)] + [""]
            row = []
        row.append(block)
    lines += [GAP.join(parts).rstrip() for parts in zip(*row)] + [""]
    named = [f"{number}: {name}" for number, name in enumerate(names, 1)]
    return "\n".join([*lines, "word · picture · share of its look", *named])


def _block(title: str, places: Tensor) -> list[str]:
    """Lines of one width: a title and a frame around float32[h, w]."""
    top = float(places.max())
    levels = (places / top * (len(SHADES) - 1)).round().long().tolist()
    inner = len(levels[0]) * CELL
    grid = ["│" + "".join(SHADES[level] * CELL for level in line) + "│" for line in levels]
    lines = [title, f"┌{'─' * inner}┐", *grid, f"└{'─' * inner}┘"]
    width = max(map(len, lines))
    return [line.ljust(width) for line in lines]


def as_picture(words: Sequence[LookingWord], pictures: Sequence[Image], path: Path) -> None:
    """A PNG: a row per word, the pictures as the model saw them, redder where it looked more.

    pictures: N of S x S pixels. Raises OSError where it cannot be written.
    """
    side = pictures[0].width
    sheet = PIL.Image.new("RGB", (side * len(pictures), (side + LABEL) * len(words)), "white")
    draw = PIL.ImageDraw.Draw(sheet)
    for row, word in enumerate(words):
        top = row * (side + LABEL)
        highest = max(float(word.maps.max()), 1e-9)
        for column, (picture, part) in enumerate(zip(pictures, word.maps, strict=True)):
            share = f"{100 * float(part.sum()):.0f}%"
            draw.text((column * side + 2, top + 2), f"{word.word} {share}", fill="black")
            sheet.paste(_overlaid(picture, part / highest), (column * side, top + LABEL))
    sheet.save(path, format="PNG")


def _overlaid(picture: Image, heat: Tensor) -> Image:
    """heat: float32[h, w] in 0..1."""
    small = PIL.Image.fromarray((heat.clamp(0, 1).numpy() * 255).astype(np.uint8))
    weight = np.asarray(small.resize(picture.size, PIL.Image.Resampling.BICUBIC), np.float32) / 255 * 0.7
    weight = rearrange(weight, "h w -> h w 1")
    mixed = np.asarray(picture, np.float32) * (1 - weight) + np.array(RED, np.float32) * weight
    return PIL.Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))


def as_seen(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> list[Image]:
    """float32[N, 3, S, S] as the encoder takes them -> pictures."""
    scale, shift = (np.asarray(x, np.float32) for x in (std, mean))
    arrays = rearrange(pixels.float().cpu().numpy(), "n c h w -> n h w c") * scale + shift
    return [PIL.Image.fromarray((array * 255).round().clip(0, 255).astype(np.uint8)) for array in arrays]

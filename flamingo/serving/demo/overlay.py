"""Where a word looked, drawn over a picture.

H, W pixels; h, w places of the encoder's grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import PIL.Image
from einops import rearrange
from numpy.typing import NDArray

from flamingo.looking import LookingWord

SIDE = 384  # pixels of the longer side of what is drawn
HEAT = ((0, 0, 4), (81, 18, 124), (183, 55, 121), (252, 137, 97), (252, 253, 191))  # dark to light
STRENGTH = 0.6  # how much of the colour is heat
DIMMED = 0.25  # how much is left of what the model does not see

Box = tuple[float, float, float, float]


def reduced(picture: PIL.Image.Image, side: int = SIDE) -> PIL.Image.Image:
    """The same with its longer side `side`: small pictures are enlarged without smoothing."""
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    mode = PIL.Image.Resampling.NEAREST if scale > 2 else PIL.Image.Resampling.LANCZOS
    return picture.resize(size, mode)


def seen_box(size: tuple[int, int], crop: str) -> Box:
    """left, top, right, bottom in pixels: where the encoder's grid lies on a picture of this size
    (width, height); with "pad" it reaches beyond."""
    width, height = size
    if crop == "squash":
        return 0, 0, width, height
    side = min(size) if crop == "center" else max(size)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def scale_of(words: Sequence[LookingWord]) -> float:
    """Where the colours end, in even shares: one scale makes the words of an answer comparable."""
    peaks = [float(word.maps.max()) * places(word) for word in words if word.maps.numel()]
    return max(3.0, float(np.quantile(peaks, 0.75))) if peaks else 3.0


def places(word: LookingWord) -> int:
    """h x w: an even look has 1 / places at each."""
    return word.maps.shape[-2] * word.maps.shape[-1]


def overlay(picture: PIL.Image.Image, grid: NDArray[np.float32], crop: str, top: float) -> PIL.Image.Image:
    """The picture in grey under a smooth heat map, what the encoder does not see dimmed.

    grid: float32[h, w], shares of a look; crop: as the image processor's; top: where the colours
    end, in even shares.
    """
    base_HWC = np.asarray(picture, dtype=np.float32) / 255
    left, up, right, down = (round(edge) for edge in seen_box(picture.size, crop))
    square = (max(1, right - left), max(1, down - up))
    shares = PIL.Image.fromarray((grid * grid.size / top).astype(np.float32))
    heat_HW = np.asarray(shares.resize(square, PIL.Image.Resampling.BICUBIC)).clip(0, 1)
    # The darkest channel, because in brightness yellow on white vanishes; lifted, because a black
    # object would darken the heat.
    grey_HW = 0.3 + 0.7 * base_HWC.min(-1)
    out_HWC = DIMMED * base_HWC + (1 - DIMMED) * 0.5
    x, y = max(0, left), max(0, up)
    width, height = min(right, picture.width) - x, min(down, picture.height) - y
    if width > 0 and height > 0:
        seen = np.s_[y : y + height, x : x + width]
        heat = colours(heat_HW[y - up : y - up + height, x - left : x - left + width])
        out_HWC[seen] = STRENGTH * heat + (1 - STRENGTH) * rearrange(grey_HW[seen], "h w -> h w 1")
    return PIL.Image.fromarray((out_HWC * 255).round().astype(np.uint8))


def dimmed(picture: PIL.Image.Image) -> PIL.Image.Image:
    """A picture that a word did not see."""
    pixels = np.asarray(picture, dtype=np.float32) / 255
    return PIL.Image.fromarray(((DIMMED * pixels + (1 - DIMMED) * 0.5) * 255).round().astype(np.uint8))


def colours(share: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32[..., 3] in 0..1 of shares in 0..1."""
    stops = np.linspace(0, 1, len(HEAT))
    return np.stack(
        [np.interp(share, stops, [colour[i] / 255 for colour in HEAT]) for i in range(3)], -1
    ).astype(np.float32)

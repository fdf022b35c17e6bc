"""Encoded picture -> RGB -> the tensor that a frozen vision encoder expects.

Shapes: H, W = height and width in pixels, S = `ImageTransform.size`. The model's processor uses
this file too, so it imports nothing else of the data room and does without torchvision.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from einops import rearrange

from flamingo.data.errors import BadSample

MAX_PIXELS = 1 << 26  # 67 million: 200 MB once decoded, above the largest camera pictures

# Named, because Pillow's full list holds formats that start other programs (EPS: Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

RESIZE_MODES = {
    "nearest": PIL.Image.Resampling.NEAREST,
    "bilinear": PIL.Image.Resampling.BILINEAR,
    "bicubic": PIL.Image.Resampling.BICUBIC,
    "lanczos": PIL.Image.Resampling.LANCZOS,
}
CROPS = ("center", "squash", "pad")


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Any Pillow mode -> RGB: 16-bit grey keeps its range, transparency becomes white."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I"):  # convert("RGB") would clip all above 255 to white
        grey = np.asarray(image) >> 8
        image = PIL.Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:  # convert("RGB") would show what transparent pixels hide
        white = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


# Shortest side that the pictures being read are wanted with; None: as they are.
_wanted_side: ContextVar[int | None] = ContextVar("wanted_side", default=None)


# Asked with the content key of a picture: whether somebody has its features, so nobody its pixels.
_has_features: ContextVar[Callable[[str], bool] | None] = ContextVar("has_features", default=None)


def needs_pixels(key: str) -> bool:
    """Whether the picture with this content key has to be decoded."""
    has = _has_features.get()
    return has is None or not has(key)


@contextmanager
def decoding_for(side: int | None, has_features: Callable[[str], bool] | None = None) -> Iterator[None]:
    """Within this `with`, pictures whose features are there are not decoded, and JPEGs much larger
    than `side` pixels are decoded at 1/2, 1/4 or 1/8 of their size, as far as both sides stay at
    least twice `side`: the resize that follows sees no less than it needs, and most of the
    decoder's work falls away."""
    tokens = _wanted_side.set(side), _has_features.set(has_features)
    try:
        yield
    finally:
        _wanted_side.reset(tokens[0])
        _has_features.reset(tokens[1])


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> PIL.Image.Image:
    """Encoded bytes -> upright RGB picture; smaller than it is within `decoding_for`.

    Raises:
        BadSample: not a picture in one of `FORMATS`, damaged, truncated, or its header announces
            more than `max_pixels` pixels (checked before any pixel is decoded).
    """
    try:
        image = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
        pixels = image.width * image.height
        if pixels <= max_pixels:
            if side := _wanted_side.get():
                image.draft("RGB", (2 * side, 2 * side))  # does nothing but to JPEGs
            image.load()
            PIL.ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image)
    except PIL.Image.DecompressionBombError as error:
        raise BadSample("too large image", str(error)) from error
    except Exception as error:  # decoders raise whatever they like on damaged bytes
        raise BadSample("damaged image", f"{len(data)} bytes: {error!r}") from error
    raise BadSample(
        "too large image",
        f"{image.width} x {image.height} = {pixels} pixels, max_pixels allows {max_pixels}",
    )


@dataclass(frozen=True)
class ImageTransform:
    """RGB picture -> float32[3, S, S], normalised. Deterministic; a value, so it pickles.

    Args:
        size: S, in pixels.
        mean, std: per channel, for values in 0..1, as the encoder was trained.
        resize_mode: one of `RESIZE_MODES`.
        crop: what to do with a picture that is not square: "center" keeps the largest centred
            square, "squash" ignores the aspect ratio, "pad" adds borders of the mean colour.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize_mode: str = "bicubic"
    crop: str = "center"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1 pixel, not {self.size}")
        for name, triple in (("mean", self.mean), ("std", self.std)):
            if len(triple) != 3:
                raise ValueError(f"{name} must have 3 values (red, green, blue), not {triple}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0, not {self.std}")
        if self.resize_mode not in RESIZE_MODES:
            choices = ", ".join(RESIZE_MODES)
            raise ValueError(f"resize_mode must be one of {choices}, not {self.resize_mode!r}")
        if self.crop not in CROPS:
            raise ValueError(f"crop must be one of {', '.join(CROPS)}, not {self.crop!r}")

    def __call__(self, image: PIL.Image.Image) -> torch.Tensor:
        pixels_HWC = np.array(self._square(to_rgb(image)))  # a copy: torch needs it writable
        pixels = rearrange(torch.from_numpy(pixels_HWC), "h w c -> c h w").float().contiguous()
        mean = torch.tensor(self.mean)[:, None, None]
        std = torch.tensor(self.std)[:, None, None]
        return pixels.div_(255).sub_(mean).div_(std)

    def _square(self, image: PIL.Image.Image) -> PIL.Image.Image:
        mode = RESIZE_MODES[self.resize_mode]
        square = (self.size, self.size)
        width, height = image.size
        if self.crop == "squash" or width == height:
            return image.resize(square, mode)
        if self.crop == "center":
            # The box is cut before resizing: a picture of 1 x 10000 pixels stays small.
            side = min(width, height)
            left, top = (width - side) / 2, (height - side) / 2
            return image.resize(square, mode, box=(left, top, left + side, top + side))
        scale = self.size / max(width, height)
        inner = (max(1, round(width * scale)), max(1, round(height * scale)))
        red, green, blue = (round(255 * value) for value in self.mean)
        canvas = PIL.Image.new("RGB", square, (red, green, blue))
        canvas.paste(image.resize(inner, mode), ((self.size - inner[0]) // 2, (self.size - inner[1]) // 2))
        return canvas

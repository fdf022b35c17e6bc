"""Any picture becomes RGB, any RGB becomes the encoder's tensor."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from flamingo.data.errors import BadSample
from flamingo.data.kinds._members import example_png as png
from flamingo.data.transforms import CROPS, ImageTransform, decode_image

PLAIN: Any = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def encode(image: PIL.Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def grey16(value: int) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.full((2, 2), value, dtype=np.uint16))


def palette_with_transparency() -> PIL.Image.Image:
    image = PIL.Image.new("P", (2, 2), 1)
    image.putpalette([9, 9, 9, 255, 0, 0])
    image.info["transparency"] = 1
    return image


@pytest.mark.parametrize(
    ("data", "pixel"),
    [
        (encode(PIL.Image.new("RGB", (2, 2), (10, 20, 30))), (10, 20, 30)),
        (encode(PIL.Image.new("L", (2, 2), 77)), (77, 77, 77)),
        (encode(PIL.Image.new("1", (2, 2), 1)), (255, 255, 255)),
        (encode(PIL.Image.new("RGBA", (2, 2), (255, 0, 0, 0))), (255, 255, 255)),
        (encode(PIL.Image.new("RGBA", (2, 2), (255, 0, 0, 255))), (255, 0, 0)),
        (encode(PIL.Image.new("LA", (2, 2), (0, 0))), (255, 255, 255)),
        (encode(palette_with_transparency()), (255, 255, 255)),
        (encode(PIL.Image.new("CMYK", (8, 8), (0, 0, 0, 255)), "JPEG"), (0, 0, 0)),
        (encode(grey16(100 * 256)), (100, 100, 100)),
        (encode(grey16(65535)), (255, 255, 255)),
        (encode(PIL.Image.new("RGB", (2, 2), "lime"), "WEBP", lossless=True), (0, 255, 0)),
        (encode(PIL.Image.new("RGB", (2, 2), "lime"), "GIF"), (0, 255, 0)),
    ],
)  # fmt: skip
def test_every_mode_becomes_rgb(data, pixel):
    image = decode_image(data)
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == pixel


def test_pictures_are_turned_upright():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    data = encode(PIL.Image.new("RGB", (8, 4)), "JPEG", exif=exif)
    assert decode_image(data).size == (4, 8)


def test_size_is_checked_before_decoding_and_limits_are_named():
    bomb = encode(PIL.Image.new("1", (3000, 3000)))
    torn = bomb[:100]  # the header only: decoding would fail
    with pytest.raises(BadSample, match="3000 x 3000 = 9000000 pixels, max_pixels allows 1000"):
        decode_image(torn, max_pixels=1000)
    with pytest.raises(BadSample, match="damaged image"):
        decode_image(torn)


@pytest.mark.parametrize("data", [b"", b"hello", png()[:30], b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_what_is_no_picture_is_a_bad_sample(data):
    with pytest.raises(BadSample, match="damaged image"):
        decode_image(data)


def test_a_transform_normalises_as_the_encoder_expects():
    image = PIL.Image.new("RGB", (6, 6), (255, 0, 51))
    tensor = ImageTransform(3, (0.5, 0.5, 0.1), (0.5, 0.25, 0.1))(image)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    assert tensor.shape == (3, 3, 3)
    torch.testing.assert_close(tensor[:, 0, 0], torch.tensor([1.0, -2.0, 1.0]))


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("size", [(8, 8), (12, 4), (3, 9), (1, 9000)])
def test_any_shape_becomes_a_square(crop, size):
    image = PIL.Image.new("RGB", size, "white")
    tensor = ImageTransform(4, crop=crop, **PLAIN)(image)
    assert tensor.shape == (3, 4, 4)
    assert (tensor == 1).all() == (crop != "pad" or size == (8, 8))


def test_center_keeps_the_middle_squash_and_pad_keep_all():
    image = PIL.Image.new("RGB", (12, 4), "white")
    image.paste("black", (0, 0, 4, 4))  # the left third
    by_crop = {c: ImageTransform(12, crop=c, resize_mode="nearest", **PLAIN)(image) for c in CROPS}
    assert by_crop["center"].min() == 1
    assert (by_crop["squash"][0] == 0).float().mean() == pytest.approx(1 / 3)
    assert by_crop["pad"][0, :, -1].tolist() == [0] * 4 + [1] * 4 + [0] * 4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"size": 0}, "size"),
        ({"std": (1.0, 0.0, 1.0)}, "std"),
        ({"mean": (1.0,)}, "mean"),
        ({"resize_mode": "cubic"}, "bilinear, bicubic"),
        ({"crop": "middle"}, "center, squash, pad"),
    ],
)
def test_wrong_settings_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        replace(ImageTransform(4, **PLAIN), **changed)

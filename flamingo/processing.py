"""FlamingoProcessor: text with <image> tokens and pictures -> what the model takes.

B rows, T tokens, N images of all rows, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor

from flamingo.config import ADDED_TOKENS, FlamingoConfig
from flamingo.data.transforms import ImageTransform, decode_image

END_OF_CHUNK, IMAGE = ADDED_TOKENS


class FlamingoImageProcessor(BaseImageProcessor):
    """Pictures -> float32[N, 3, S, S], exactly as in training (`data.transforms`)."""

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        image_size: int = 224,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        resize_mode: str = "bicubic",
        crop: str = "center",
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.image_size, self.resize_mode, self.crop = image_size, resize_mode, crop
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    @property
    def transform(self) -> ImageTransform:
        mean, std = tuple(self.image_mean), tuple(self.image_std)
        return ImageTransform(self.image_size, mean, std, self.resize_mode, self.crop)  # type: ignore[arg-type]

    def preprocess(self, images, return_tensors: str = "pt", **kwargs) -> BatchFeature:  # type: ignore[override]
        """images: a PIL picture, a path, or a list of them."""
        images = images if isinstance(images, (list, tuple)) else [images]
        transform = self.transform
        pixels = [transform(_open(image)) for image in images]
        stacked = torch.stack(pixels) if pixels else torch.empty(0, 3, self.image_size, self.image_size)
        return BatchFeature({"pixel_values": stacked}, tensor_type=return_tensors)

    def __call__(self, images, *args, **kwargs) -> BatchFeature:
        return self.preprocess(images, **kwargs)


def _open(image: Image.Image | str | Path) -> Image.Image:
    if isinstance(image, (str, Path)):
        image = decode_image(Path(image).read_bytes())
    if min(image.size) < 1:
        raise ValueError(f"a picture of {image.size[0]} x {image.size[1]} pixels shows nothing")
    return image


class FlamingoProcessor(ProcessorMixin):
    """Tokenizer and image processor in one: `processor(text=[...], images=[...])`.

    Text holds one `<image>` per picture; `images` is the flat list of all pictures of all
    rows, in reading order. Rows are padded on the left, as generation needs it.
    """

    attributes = ["image_processor", "tokenizer"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(self, image_processor=None, tokenizer: Any = None, **kwargs):
        super().__init__(image_processor, tokenizer, **kwargs)
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
        self.end_of_chunk_token_id = tokenizer.convert_tokens_to_ids(END_OF_CHUNK)

    def __call__(self, images=None, text=None, padding_side="left", **kwargs) -> BatchFeature:  # type: ignore[override]
        """text: a string or a list of B; images: None, one picture or a flat list of N.

        Returns input_ids, attention_mask int64[B, T] and, with images, pixel_values
        float32[N, 3, S, S]. Raises ValueError when the <image> tokens and pictures differ in number.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        pictures = [] if images is None else images if isinstance(images, (list, tuple)) else [images]
        wanted = sum(t.count(IMAGE) for t in texts)
        if wanted != len(pictures):
            raise ValueError(
                f"{wanted} {IMAGE} in the text but {len(pictures)} pictures: "
                f"write one {IMAGE} where each picture stands"
            )
        encoded = self.tokenizer(  # type: ignore[operator]
            texts,
            add_special_tokens=False,
            padding=True,
            padding_side=padding_side,
            return_tensors="pt",
        )
        data = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
        if pictures:
            data.update(self.image_processor(pictures))  # type: ignore[operator]
        return BatchFeature(data)

    @classmethod
    def for_model(cls, config: FlamingoConfig, tokenizer) -> FlamingoProcessor:
        """The processor of a config: its encoder's size and normalisation."""
        vision = config.vision_config
        images = FlamingoImageProcessor(vision.image_size, vision.mean, vision.std)  # type: ignore[union-attr]
        return cls(images, tokenizer)


AutoImageProcessor.register("FlamingoImageProcessor", slow_image_processor_class=FlamingoImageProcessor)

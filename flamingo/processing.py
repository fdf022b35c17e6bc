"""FlamingoProcessor: text with <image> tokens and pictures -> what the model takes.

B rows, T tokens, N images of all rows, S pixels a side.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor

from flamingo import chat
from flamingo.config import ADDED_TOKENS, FlamingoConfig
from flamingo.data.transforms import ImageTransform, decode_image

END_OF_CHUNK, IMAGE = ADDED_TOKENS
LARGEST = 100 << 20  # bytes of a picture that is fetched
SECONDS = 60.0  # without a byte of it
AROUND_IMAGE = "<fake_token_around_image>"  # Idefics learned pictures between two of them


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

    def __call__(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        return self.preprocess(images, **kwargs)


def _open(image: Image.Image | str | Path) -> Image.Image:
    if isinstance(image, (str, Path)):
        image = decode_image(_bytes(image))
    if min(image.size) < 1:
        raise ValueError(f"a picture of {image.size[0]} x {image.size[1]} pixels shows nothing")
    return image


def _bytes(image: str | Path) -> bytes:
    """Of a file, an address or a data URI. Not `load_image` of transformers: that decodes every format
    that Pillow knows, also those that start other programs.

    Raises ValueError for an address or a URI that holds none; OSError for a file.
    """
    if isinstance(image, str) and image.startswith("data:image/"):
        head, _, code = image.partition(",")
        try:
            return base64.b64decode(code)
        except ValueError as error:
            raise ValueError(f"picture {head[:60]!r}: no base64 follows: {error}") from None
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        return _fetched(image)
    return Path(image).read_bytes()


def _fetched(address: str) -> bytes:
    import requests

    held = bytearray()
    try:
        with requests.get(address, stream=True, timeout=SECONDS) as answer:
            answer.raise_for_status()
            for block in answer.iter_content(1 << 20):
                held += block
                if len(held) > LARGEST:
                    raise ValueError(f"picture {address}: larger than {LARGEST >> 20} MB; fetch it yourself")
    except requests.RequestException as error:
        raise ValueError(f"picture {address} cannot be fetched: {error}") from error
    return bytes(held)


class FlamingoProcessor(ProcessorMixin):
    """Tokenizer and image processor in one: `processor(text=[...], images=[...])`.

    Text holds one `<image>` per picture; `images` is the flat list of all pictures of all
    rows, in reading order. Rows are padded on the left, as generation needs it. `<|endofchunk|>` in a
    text stands for `end_of_chunk_token`, whatever that is, and `<image>` for what `marked` makes of it.
    Each text begins with `begin_token` or, with `add_special_tokens`, with what the tokenizer puts there by
    itself; that is not the same, since some put a space before the first word of a text alone.

    chat_template: how `apply_chat_template` writes a chat. None: the LM's own, with `<image>` where a
    picture stands; where it has none, few-shot style (`chat.DEFAULT_TEMPLATE`).
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer: Any = None,
        chat_template=None,
        end_of_chunk_token: str = END_OF_CHUNK,
        begin_token: str = "",
        add_special_tokens: bool = False,
        **kwargs,
    ):
        chat_template = chat_template or tokenizer.chat_template or chat.DEFAULT_TEMPLATE
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)
        self.image_token, self.image_token_id = IMAGE, tokenizer.convert_tokens_to_ids(IMAGE)
        self.end_of_chunk_token = end_of_chunk_token
        self.end_of_chunk_token_id = tokenizer.convert_tokens_to_ids(end_of_chunk_token)
        self.begin_token, self.add_special_tokens = begin_token, add_special_tokens
        self.around_image_token = AROUND_IMAGE if AROUND_IMAGE in tokenizer.get_vocab() else None

    def __call__(self, images=None, text=None, padding_side="left", **kwargs) -> BatchFeature:  # type: ignore[override]
        """text: a string or a list of B; images: None, one picture, a flat list of N, or a list of
        one list per row. A picture is a PIL image, a path, or an address. Others go to the tokenizer.

        Returns input_ids, attention_mask int64[B, T] and, with images, pixel_values
        float32[N, 3, S, S]. Raises ValueError when the <image> tokens and pictures differ in number,
        or for a picture that shows nothing.
        """
        if text is None:
            raise ValueError(f"text is missing: write one {IMAGE} where each picture stands")
        for name in ("videos", "audio"):
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"{name}: a Flamingo's processor takes text and images only")
        if kwargs.pop("return_tensors", None) not in (None, "pt"):
            raise ValueError('return_tensors: a Flamingo takes PyTorch tensors, "pt"')
        kwargs.pop("return_text_replacement_offsets", None)  # no text is replaced
        texts = [self.marked(each) for each in ([text] if isinstance(text, str) else text)]
        pictures = _match(texts, images)
        options = {
            "add_special_tokens": self.add_special_tokens,
            "padding": True,
            **kwargs.pop("text_kwargs", {}),
            **kwargs,
        }
        encoded = self.tokenizer(texts, padding_side=padding_side, return_tensors="pt", **options)  # type: ignore[operator]
        data = {name: encoded[name] for name in encoded if name != "token_type_ids"}
        kept = int((data["input_ids"] == self.image_token_id).sum())
        if kept != len(pictures):
            raise ValueError(
                f"{len(pictures)} pictures but {kept} {IMAGE} left after truncation: raise max_length"
            )
        if pictures:
            data.update(self.image_processor(pictures))  # type: ignore[operator]
        return BatchFeature(data)

    def marked(self, text: str) -> str:
        """The text as the model learned to read it. Prompts are written with `<|endofchunk|>` and a bare
        `<image>`; converted models have another token for the former, most begin with one, and Idefics has
        one on both sides of a picture, once between neighbours. What a text has already is left alone."""
        around = self.around_image_token
        if around and around not in text:
            text = text.replace(IMAGE, around + IMAGE + around)
        text = text.replace(END_OF_CHUNK, self.end_of_chunk_token)
        if around:
            text = text.replace(around * 2, around)
        if self.add_special_tokens:
            return text.removeprefix(self.tokenizer.bos_token or "")  # type: ignore[attr-defined]
        return text if text.startswith(self.begin_token) else self.begin_token + text

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of prompts as `__call__` gives them, without padding; an image is one."""
        marked = [self.marked(text) for text in texts]
        return self.tokenizer(marked, add_special_tokens=self.add_special_tokens)["input_ids"]  # type: ignore[operator]

    def apply_chat_template(self, conversation, chat_template=None, **kwargs):  # type: ignore[override]
        """As in transformers: a chat (or a list of chats) whose turns hold text and images.

        A template that knows text only, such as the LM's own, gets `<image>` where pictures stand.
        With tokenize=True what `__call__` returns (return_dict=True) or its input_ids.
        """
        conversations, is_batch = self._normalize_conversations(conversation)
        if kwargs.get("tokenize"):
            images = [chat.images_of(turns) for turns in conversations]
            given = dict(kwargs.get("processor_kwargs") or {})
            if any(images):
                given.setdefault("images", images if is_batch else images[0])
            kwargs["processor_kwargs"] = given
        if not chat.places_images(self._resolve_chat_template(chat_template)):
            conversations = [chat.as_text(turns, IMAGE) for turns in conversations]
        turns = conversations if is_batch else conversations[0]
        return super().apply_chat_template(turns, chat_template, **kwargs)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers; without `trust_remote_code=True` code of a folder is refused, not asked for."""
        return super().from_pretrained(*args, **{"trust_remote_code": False, **kwargs})

    @classmethod
    def for_model(cls, config: FlamingoConfig, tokenizer) -> FlamingoProcessor:
        """The processor of a config: its encoder's size and normalisation."""
        vision = config.vision_config
        images = FlamingoImageProcessor(vision.image_size, vision.mean, vision.std)  # type: ignore[union-attr]
        return cls(images, tokenizer)


def _match(texts: list[str], images) -> list:
    """The flat list of pictures, once their number is checked; row by row where they come so."""
    pictures = [] if images is None else list(images) if isinstance(images, (list, tuple)) else [images]
    wanted = [text.count(IMAGE) for text in texts]
    nested = [isinstance(row, (list, tuple)) for row in pictures]
    if any(nested):
        if not all(nested) or len(pictures) != len(texts):
            raise ValueError(f"images: give one list per row ({len(texts)}) or one flat list of pictures")
        for row, (count, own) in enumerate(zip(wanted, pictures, strict=True)):
            if count != len(own):
                raise ValueError(f"row {row}: {count} {IMAGE} in the text but {len(own)} pictures")
        pictures = [picture for own in pictures for picture in own]
    if sum(wanted) != len(pictures):
        raise ValueError(
            f"{sum(wanted)} {IMAGE} in the text but {len(pictures)} pictures: "
            f"write one {IMAGE} where each picture stands"
        )
    return pictures


# Here and not in `registration`: loading a processor finds its parts by their names. PIL whatever
# the backend asked for: pictures are the same as in training.
AutoImageProcessor.register(
    FlamingoConfig,
    image_processor_classes=dict.fromkeys(("torchvision", "pil"), FlamingoImageProcessor),
    exist_ok=True,
)

"""`flamingo data show`: a page with the first documents as the model will see them.

Text is shown in pieces: tokens that follow each other, see the same image and have loss alike.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from einops import rearrange
from torch import Tensor

from flamingo.data.batch import IGNORE, Batch, Collator
from flamingo.data.config import SourceConfig
from flamingo.data.document import Document
from flamingo.data.stream import Stream
from flamingo.data.transforms import ImageTransform

IMAGE, END_OF_CHUNK = "<image>", "<|endofchunk|>"
COLORS = 8  # that the page has for images, again and again


@dataclass(frozen=True)
class Piece:
    """text: of some tokens; image: number of the image that they see, None: none; loss: on them."""

    text: str
    image: int | None
    loss: bool
    kind: str  # "text", "image" or "end"


@dataclass(frozen=True)
class Shown:
    """One document. images: data: addresses of the frames of each image."""

    key: str
    pieces: list[Piece]
    images: list[list[str]]
    tokens: int
    learned: int
    cut: int
    skipped: list[str]


def show(
    source: SourceConfig,
    out: Path,
    *,
    documents: int,
    seed: int = 0,
    tokenizer: str | None = None,
    side: int = 224,
) -> int:
    """Write the page `out` with the documents at positions 0, 1, ... of the source; how many tokens.

    tokenizer: name or folder, e.g. of a model; None: every byte is a token.

    Raises:
        ValueError: the source or the tokenizer is not what it must be.
    """
    from jinja2 import Environment, PackageLoader

    words: Any = _tokenizer(tokenizer)
    ids = _added(words)
    transform = ImageTransform(side, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    collator = Collator(words, transform, *ids, source.max_tokens, source.crop, source.learn)
    whole = Collator(words, transform, *ids, 1 << 30)
    stream = Stream(source, seed, image_side=side)
    shown = []
    for position in range(documents):
        document, skipped = stream.read(position)
        batch = collator([document])
        batch = replace(batch, look_ahead=torch.tensor([stream.looks_ahead(position)]))
        uncut = whole([_without_pictures(document)]).input_ids.shape[1]
        told = [f"{bad.key}: {bad.fault}: {bad.detail}" for bad in skipped]
        shown.append(_shown(batch, words, ids, uncut, told))
    # What is shown comes from anywhere: every value is escaped.
    environment = Environment(loader=PackageLoader("flamingo.data.tools", ""), autoescape=True)
    page = environment.get_template("show.html.jinja")
    text = page.render(source=source.model_dump(), documents=shown, bytes=tokenizer is None, colors=COLORS)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    return sum(document.tokens for document in shown)


def _without_pictures(document: Document) -> Document:
    """The same with images of one pixel: only tokens are counted."""
    from flamingo.data.document import Image, Text

    blank = Image(PIL.Image.new("RGB", (1, 1)), "blank")
    return replace(document, items=tuple(i if isinstance(i, Text) else blank for i in document.items))


def _shown(batch: Batch, words: Any, ids: tuple[int, int], uncut: int, skipped: list[str]) -> Shown:
    tokens, learned = batch.input_ids[0].tolist(), (batch.labels[0] != IGNORE).tolist()
    frames = batch.frames.tolist() if batch.frames is not None else [1] * len(batch.image_keys)
    pictures = iter(batch.pixel_values)
    images = [[_address(next(pictures)) for _ in range(count)] for count in frames]
    ahead = batch.look_ahead is not None and bool(batch.look_ahead[0])
    seen = _seen([token == ids[0] for token in tokens], ahead)
    return Shown(
        batch.keys[0],
        list(_pieces(tokens, learned, seen, words, ids)),
        images,
        len(tokens),
        batch.n_targets,
        max(0, uncut - len(tokens)),
        skipped,
    )


def _seen(is_image: list[bool], ahead: bool) -> list[int | None]:
    """Which image each token sees: the last one before it; looking ahead, the next one."""
    seen: list[int | None] = []
    last = -1
    for image in is_image:
        last += image
        seen.append(last if last >= 0 else None)
    if ahead:
        total = sum(is_image)
        after = [
            (-1 if number is None else number) + (not image)
            for number, image in zip(seen, is_image, strict=True)
        ]
        seen = [number if number < total else None for number in after]
    return seen


def _pieces(
    tokens: list[int], learned: list[bool], seen: list[int | None], words: Any, ids: tuple[int, int]
) -> Iterator[Piece]:
    start = 0
    kinds = ["image" if token == ids[0] else "end" if token == ids[1] else "text" for token in tokens]
    marks = list(zip(kinds, seen, learned, strict=True))
    for end in range(1, len(tokens) + 1):
        if end < len(tokens) and marks[end] == marks[start] and kinds[end] == "text":
            continue
        kind, image, loss = marks[start]
        text = words.decode(tokens[start:end]) if kind == "text" else ""
        yield Piece(text, image, loss, kind)
        start = end


def _address(pixels: Tensor) -> str:
    """float[3, S, S] in -1..1 -> a JPEG as a data: address."""
    values = rearrange((pixels * 0.5 + 0.5).clamp(0, 1) * 255, "c h w -> h w c").to(torch.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(values.numpy()).save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _tokenizer(name: str | None) -> Any:
    if name is None:
        return _bytes_as_tokens()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"--tokenizer {name}: {str(error).splitlines()[0]}") from None


def _bytes_as_tokens() -> Any:
    """A tokenizer of 256 tokens, which takes any text and needs no file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    model.decoder = decoders.ByteLevel()  # pyright: ignore
    return PreTrainedTokenizerFast(tokenizer_object=model)


def _added(words: Any) -> tuple[int, int]:
    """Ids of <image> and <|endofchunk|>: the tokenizer's own, or the next two free ones."""
    vocabulary = words.get_vocab()
    free = max(vocabulary.values()) + 1
    return vocabulary.get(IMAGE, free), vocabulary.get(END_OF_CHUNK, free + 1)

"""Documents -> tensors: what stands in a row, what is learned, and which pictures go with it.

Shapes: B rows, T tokens of the longest row, K <image> tokens of all rows, N pictures (K, and more
with clips), M pictures with pixels, H = W = size of the transform. A row is a sequence of turns:

    <image> Question: what color is it? Answer: blue <|endofchunk|>  <image> ... <|endofchunk|>
       -                   -                      x        x            -             x

with x where there is loss on predicting that token. Every picture and every clip is one <image>
token; every run
of text ends with <|endofchunk|>, before the next picture and at the end of the document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flamingo.data.document import Clip, Document, Image, Text
from flamingo.data.draws import draw
from flamingo.data.errors import Skipped
from flamingo.data.transforms import ImageTransform

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100  # the label of positions without loss, as torch's cross_entropy has it


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one source.

    Attributes:
        input_ids: int64[B, T], padded on the right.
        attention_mask: int64[B, T], 1 at real tokens.
        labels: int64[B, T], `IGNORE` where there is no loss; not shifted: the model does that.
        pixel_values: float32[M, 3, H, W]. Without `skip_pixels` one entry per picture of the
            batch, row by row (M = N).
        pixel_index: int64[N], which entry of `pixel_values` a picture has; -1: it was skipped.
        image_keys: N content keys of the pictures.
        keys: B document keys.
        look_ahead: bool[B], documents whose words see the next image (p_next); None: none.
        frames: int64[K], pictures of each <image> token; None: one each.
        skipped: bad samples that the documents stand for.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    pixel_values: Tensor
    pixel_index: Tensor
    image_keys: list[str]
    keys: list[str]
    skipped: list[Skipped] = field(default_factory=list)
    look_ahead: Tensor | None = None
    frames: Tensor | None = None

    @property
    def n_targets(self) -> int:
        """Tokens with loss. Position t predicts t + 1, so the first of a row never counts."""
        return int((self.labels[:, 1:] != IGNORE).sum())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on another device, with the same dtypes."""
        return self._each(lambda tensor: tensor.to(device=device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """In page-locked memory; DataLoader calls this."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: change(value) for name, value in tensors.items()})


@dataclass
class _Turn:
    """Tokens of some images and the run of text after them, or of a whole row."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    images: list[Image | Clip] = field(default_factory=list)
    loss: bool | None = None  # of the last text; None: no text yet

    def add(self, ids: list[int], loss: bool) -> None:
        self.ids += ids
        self.labels += ids if loss else [IGNORE] * len(ids)


class Collator:
    """list[Document] -> Batch. Holds no state between calls, and pickles.

    Args:
        tokenizer: of the language model, with or without the two added tokens.
        transform: for the pictures.
        image_token_id, end_of_chunk_id: ids of <image> and <|endofchunk|>.
        max_tokens: longest row. Of a longer document turns are dropped at its end until it fits;
            if already the first does not, its text is cut.
        learn: which texts have loss: "marked" by the document, "all", "after_first_image" (marked, and
            an image stands before), or "last" (of each turn the last text).
        crop: "start": the first turns are kept; "random": a run of turns that begins anywhere,
            as the document's seed says.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        transform: ImageTransform,
        image_token_id: int,
        end_of_chunk_id: int,
        max_tokens: int,
        crop: str = "start",
        learn: str = "marked",
    ) -> None:
        if max_tokens < 2:
            raise ValueError(f"max_tokens must be at least 2 (an image, a token), not {max_tokens}")
        if image_token_id == end_of_chunk_id:
            raise ValueError(f"<image> and <|endofchunk|> have the same token id {image_token_id}")
        self.tokenizer, self.transform, self.max_tokens = tokenizer, transform, max_tokens
        self.image_token_id, self.end_of_chunk_id = image_token_id, end_of_chunk_id
        self.random_crop, self.learn = crop == "random", learn
        padding = tokenizer.pad_token_id
        # Any id will do: the attention mask and the labels hide it.
        self.pad_token_id = padding if isinstance(padding, int) else end_of_chunk_id

    def __call__(
        self,
        documents: Sequence[Document],
        skip_pixels: Callable[[str], bool] | None = None,
    ) -> Batch:
        """Tokenise, cut, pad.

        Args:
            documents: at least one.
            skip_pixels: asked with the key of each picture; True leaves its pixels out, for a
                trainer that holds its features. If given, a picture that is there several times
                has one entry in `pixel_values`.
        """
        if not documents:
            raise ValueError("a batch needs at least one document")
        tokens = self._tokenize(documents)
        rows = [self._cut(self._turns(document, tokens), document.seed) for document in documents]
        shown = [_pictures(item) for row in rows for item in row.images]
        images = [image for pictures in shown for image in pictures]
        frames = [len(pictures) for pictures in shown]
        pixel_values, pixel_index = self._pixels(images, skip_pixels)
        return Batch(
            input_ids=_pad([row.ids for row in rows], self.pad_token_id),
            attention_mask=_pad([[1] * len(row.ids) for row in rows], 0),
            labels=_pad([row.labels for row in rows], IGNORE),
            pixel_values=pixel_values,
            pixel_index=pixel_index,
            image_keys=[image.key for image in images],
            keys=[document.key for document in documents],
            frames=torch.tensor(frames) if any(count > 1 for count in frames) else None,
        )

    def _tokenize(self, documents: Sequence[Document]) -> Iterator[list[int]]:
        """Token ids of every text of every document, in order: one call for the whole batch."""
        texts = [item.text for document in documents for item in document.items if isinstance(item, Text)]
        if not texts:
            return
        # A caption may spell out "<image>": that is no picture, and would shift all that follow.
        reserved = {self.image_token_id, self.end_of_chunk_id}
        for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]:  # pyright: ignore
            yield [token for token in ids if token not in reserved]  # pyright: ignore

    def _turns(self, document: Document, tokens: Iterator[list[int]]) -> list[_Turn]:
        turns = [_Turn()]
        for item in document.items:
            if isinstance(item, (Image, Clip)):
                if turns[-1].loss is not None:  # a picture after text opens a turn
                    turns.append(_Turn())
                turns[-1].add([self.image_token_id], loss=False)
                turns[-1].images.append(item)
            elif ids := next(tokens):
                loss = item.loss or self.learn in ("all", "last")
                if self.learn == "after_first_image":
                    loss = loss and (len(turns) > 1 or bool(turns[-1].images))
                elif self.learn == "last":  # what came before in this turn was no answer
                    turns[-1].labels = [IGNORE] * len(turns[-1].ids)
                turns[-1].add(ids, loss)
                turns[-1].loss = loss
        for turn in turns:
            if turn.loss is not None:
                turn.add([self.end_of_chunk_id], turn.loss)
        return turns

    def _cut(self, turns: list[_Turn], seed: int) -> _Turn:
        """The turns that fit, joined to a row of 1..max_tokens tokens."""
        if self.random_crop:
            left = [sum(len(turn.ids) for turn in turns[n:]) for n in range(len(turns))]
            starts = sum(tokens >= self.max_tokens for tokens in left)  # that fill a row
            turns = turns[draw(seed, "crop") % starts :] if starts else turns
        row = _Turn()
        for number, turn in enumerate(turns):
            if number and len(row.ids) + len(turn.ids) > self.max_tokens:
                break
            row.ids += turn.ids
            row.labels += turn.labels
            row.images += turn.images
        row.ids, row.labels = row.ids[: self.max_tokens], row.labels[: self.max_tokens]
        row.images = row.images[: row.ids.count(self.image_token_id)]
        if not row.ids:  # a text of which nothing is left; a row without tokens breaks attention
            row.add([self.end_of_chunk_id], loss=False)
        return row

    def _pixels(
        self, images: list[Image], skip_pixels: Callable[[str], bool] | None
    ) -> tuple[Tensor, Tensor]:
        """float32[M, 3, H, W] and int64[N], as `Batch` has them."""
        if skip_pixels is None:
            wanted, index = images, list(range(len(images)))
        else:
            first = {image.key: image for image in images}
            wanted = [image for key, image in first.items() if not skip_pixels(key)]
            entry = {image.key: number for number, image in enumerate(wanted)}
            index = [entry.get(image.key, -1) for image in images]
        if wanted:
            pixels = torch.stack([self.transform(image.image) for image in wanted])
        else:
            pixels = torch.zeros(0, 3, self.transform.size, self.transform.size)
        return pixels, torch.tensor(index, dtype=torch.int64)


def _pictures(item: Image | Clip) -> tuple[Image, ...]:
    return item.frames if isinstance(item, Clip) else (item,)


def _pad(rows: list[list[int]], value: int) -> Tensor:
    """B rows -> int64[B, T], filled up on the right."""
    longest = max(map(len, rows))
    padded = [row + [value] * (longest - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.int64)

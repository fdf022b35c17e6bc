"""Batches of several sources -> the rows of one forward pass.

Packed, documents of all sources stand one after the other in a row, each a segment of its own:
no attention across them, positions that restart, no image of another document in sight. Nothing
is computed for padding but at the ends of rows, and matrix products are as tall as they can be. Of a
document's last token only the label is there: nothing follows that would need to read it.
B rows, T tokens of the longest row, K <image> tokens, N pictures in the order of their tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from flamingo.data.batch import IGNORE, Batch
from flamingo.runtime import recurring


@dataclass(frozen=True)
class Rows:
    """What one forward pass sees.

    Attributes:
        input_ids: int64[B, T]; labels: int64[B, T], `IGNORE` where there is no loss, not shifted: the token
            before predicts them, also where they are the next document's (`packed`).
        source: int64[B, T], the number of the batch that a label came from.
        attention_mask: int64[B, T] for padded rows, None for packed ones.
        segment_ids: int64[B, T] for packed rows, None for padded ones; the padding at the end of
            a row is a segment too.
        look_ahead: bool[B, T], tokens that see the next image (p_next); None: none.
        pixel_values, pixel_index, image_keys: as in `Batch`, of all pictures in the order of rows.
        frames: int64[K], pictures of each <image> token; None: one each.
    """

    input_ids: Tensor
    labels: Tensor
    source: Tensor
    attention_mask: Tensor | None
    segment_ids: Tensor | None
    pixel_values: Tensor
    pixel_index: Tensor
    image_keys: list[str]
    look_ahead: Tensor | None = None
    frames: Tensor | None = None

    @property
    def target_source(self) -> Tensor:
        """int64[M]: the source of each target, in the order of the model's `reduction="none"`."""
        return self.source[:, 1:][self.labels[:, 1:] != IGNORE]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Rows:
        """The same rows on another device."""
        moved = {
            name: value.to(device=device, non_blocking=non_blocking)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def padded(batches: Sequence[Batch | None]) -> list[Rows]:
    """One forward pass per batch, one document per row, padded on the right.

    batches: one of each source, None for a source that has not joined yet.
    """
    return [
        Rows(
            input_ids=batch.input_ids,
            labels=batch.labels,
            source=torch.full_like(batch.input_ids, number),
            attention_mask=batch.attention_mask,
            segment_ids=None,
            pixel_values=batch.pixel_values,
            pixel_index=batch.pixel_index,
            image_keys=batch.image_keys,
            look_ahead=None if batch.look_ahead is None else _spread(batch.look_ahead, batch.input_ids),
            frames=batch.frames,
        )
        for number, batch in enumerate(batches)
        if batch is not None
    ]


def with_image(rows: Rows, image_token_id: int) -> Rows:
    """The same and one row more, an image of which nothing is learned. Its picture is the caller's."""

    def add(values: Tensor | None, first: int, others: int) -> Tensor | None:
        if values is None:
            return None
        row = torch.full_like(values[:1], others)
        row[:, 0] = first
        return torch.cat((values, row))

    return replace(
        rows,
        input_ids=add(rows.input_ids, image_token_id, 0),
        labels=add(rows.labels, IGNORE, IGNORE),
        source=add(rows.source, 0, 0),
        attention_mask=add(rows.attention_mask, 1, 0),
        segment_ids=add(rows.segment_ids, 0, -1),
        look_ahead=add(rows.look_ahead, 0, 0),
    )


@dataclass
class _Piece:
    """One document of one batch: its tokens, which of all pictures are its own, and how many of
    them each of its <image> tokens has. source, as long: where each label came from."""

    source: Tensor
    ids: Tensor
    labels: Tensor
    images: list[int]
    frames: list[int]
    ahead: bool
    length: int  # as the LM reads it


def packed(
    batches: Sequence[Batch | None], row_tokens: int, image_token_id: int, image_tokens: int = 1
) -> list[Rows]:
    """All documents in one forward pass of rows of at most `row_tokens` tokens.

    batches: as for `padded`; image_tokens: that the LM reads for each <image>, of which the rows hold
    one; `row_tokens` counts them all. First fit, longest first, in rows of about one length: the order of
    documents within a step does not change its result. Filled up to a length that comes again in other
    steps (`runtime.recurring`). Raises ValueError for a document longer than a row.
    """
    joined = [(number, batch) for number, batch in enumerate(batches) if batch is not None]
    rows = _level(_pieces(joined, image_token_id, image_tokens), row_tokens)
    rows = [_closed_up(row, image_token_id) for row in rows]
    longest = max(sum(len(piece.ids) for piece in row) for row in rows)
    length = min(recurring(longest), row_tokens)
    order = [image for row in rows for piece in row for image in piece.images]
    keys = [key for _, batch in joined for key in batch.image_keys]
    frames = [count for row in rows for piece in row for count in piece.frames]
    return [
        Rows(
            input_ids=_join([[piece.ids for piece in row] for row in rows], 0, length),
            labels=_join([[piece.labels for piece in row] for row in rows], IGNORE, length),
            source=_join([[piece.source for piece in row] for row in rows], 0, length),
            attention_mask=None,
            segment_ids=_join(
                [[torch.full_like(p.ids, number) for number, p in enumerate(row)] for row in rows], -1, length
            ),
            pixel_values=torch.cat([batch.pixel_values for _, batch in joined]),
            pixel_index=_pixel_index([batch for _, batch in joined])[order],
            image_keys=[keys[image] for image in order],
            look_ahead=_join(
                [[torch.full_like(p.ids, p.ahead, dtype=torch.bool) for p in row] for row in rows], 0, length
            )
            if any(piece.ahead for row in rows for piece in row)
            else None,
            frames=torch.tensor(frames) if any(count > 1 for count in frames) else None,
        )
    ]


def _spread(rows: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, T] as `like`."""
    return rows[:, None].expand_as(like)


def _pixel_index(batches: list[Batch]) -> Tensor:
    """int64[N]: as in `Batch`, into the pixels of all batches; -1 stays -1."""
    found, before = [], 0
    for batch in batches:
        found.append(torch.where(batch.pixel_index < 0, -1, batch.pixel_index + before))
        before += len(batch.pixel_values)
    return torch.cat(found)


def _pieces(batches: list[tuple[int, Batch]], image_token_id: int, image_tokens: int) -> list[_Piece]:
    """The documents of (number of the source, batch) pairs."""
    pieces, first = [], 0
    for number, batch in batches:
        lengths = batch.attention_mask.sum(dim=1).tolist()
        counts = (batch.input_ids == image_token_id).sum(dim=1).tolist()
        frames = iter([1] * sum(counts) if batch.frames is None else batch.frames.tolist())
        for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            ids, labels = batch.input_ids[row, :length], batch.labels[row, :length].clone()
            labels[0] = IGNORE  # the document before must not predict the first token of this one
            sources = torch.full_like(ids, number)
            mine = list(islice(frames, count))
            images = list(range(first, first + sum(mine)))
            ahead = batch.look_ahead is not None and bool(batch.look_ahead[row])
            read = length + count * (image_tokens - 1)
            pieces.append(_Piece(sources, ids, labels, images, mine, ahead, read))
            first += sum(mine)
    return pieces


def _level(pieces: list[_Piece], row_tokens: int) -> list[list[_Piece]]:
    """As few rows as first fit needs, and of those the shortest: all are as long as the longest."""
    rows = _first_fit(pieces, row_tokens)
    lengths = [piece.length for piece in pieces]
    low, high = max(max(lengths), -(-sum(lengths) // len(rows))), row_tokens
    while low < high:
        middle = (low + high) // 2
        found = _first_fit(pieces, middle)
        if len(found) <= len(rows):
            rows, high = found, middle
        else:
            low = middle + 1
    return rows


def _first_fit(pieces: list[_Piece], row_tokens: int) -> list[list[_Piece]]:
    rows: list[list[_Piece]] = []
    room: list[int] = []
    for piece in sorted(pieces, key=lambda piece: -piece.length):
        length = piece.length
        if length > row_tokens:
            raise ValueError(
                f"a document of {length} tokens does not fit in a packed row of {row_tokens}: "
                "raise pack_tokens, or lower the source's max_tokens or its pictures"
            )
        place = next((i for i, left in enumerate(room) if left >= length), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(row_tokens)
        rows[place].append(piece)
        room[place] -= length
    return rows


def _closed_up(row: list[_Piece], image_token_id: int) -> list[_Piece]:
    """The documents of a row, all but its last without their last token, whose label stands at the first
    token of the next document. A picture's token stays: it has a picture."""
    out, moved = [], None  # what the next document's first token gets: a label and its source
    for number, piece in enumerate(row):
        if moved is not None:
            piece.labels[0], piece.source[0] = moved
        shorter = number + 1 < len(row) and len(piece.ids) > 1 and piece.ids[-1] != image_token_id
        moved = (piece.labels[-1], piece.source[-1]) if shorter else None
        read = slice(None, -1 if shorter else None)
        ids, labels, source = (x[read] for x in (piece.ids, piece.labels, piece.source))
        out.append(replace(piece, ids=ids, labels=labels, source=source))
    return out


def _join(rows: list[list[Tensor]], fill: int, length: int) -> Tensor:
    """Rows of pieces -> [B, length], filled up on the right."""
    joined = [torch.cat(row) for row in rows]
    return torch.stack([F.pad(row, (0, length - len(row)), value=fill) for row in joined])

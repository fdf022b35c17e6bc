"""Rows in which an image is one <image> token -> rows in which it is as many as it has vectors.

B rows, T tokens, X tokens of the rows that come of them, L tokens of an image there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from flamingo.runtime import recurring


@dataclass(frozen=True)
class Expanded:
    """Attributes:
    input_ids: int64[B, X]; last: int64[B, T], where each token is, of an image the last of its tokens.
    attention_mask: int64[B, X]; segment_ids, labels: int64[B, X] where they were given.
    """

    input_ids: Tensor
    last: Tensor
    attention_mask: Tensor
    segment_ids: Tensor | None = None
    labels: Tensor | None = None

    def mask_and_positions(self) -> tuple[Tensor | None, Tensor | None]:
        """attention_mask and position_ids that the LM needs besides: none where nothing is padded, or
        where segments tell both."""
        if self.segment_ids is not None or bool(self.attention_mask.all()):
            return None, None
        return self.attention_mask, (self.attention_mask.cumsum(dim=1) - 1).clamp_min(0)


def row_length(longest: int, segment_ids: Tensor | None) -> int:
    """Of expanded rows, the longest of which holds so many tokens: packed ones are filled up to a length
    that comes again in other steps (`runtime.recurring`)."""
    return longest if segment_ids is None else recurring(longest)


def expand(
    input_ids: Tensor,
    image_token_id: int,
    times: int,
    attention_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    labels: Tensor | None = None,
    pad: int = 0,
) -> Expanded:
    """Each <image> token of int64[B, T] `times` times; rows are padded on the side that they were.

    Without any padding on the left, as generation wants it. Of an image's tokens the first keeps the
    label. Padding is a segment of its own, -1, and has no label. On the right there is no more of it
    than the longest row leaves, or a length of packed rows that comes again in other steps
    (`runtime.recurring`): `last` of what is cut off is the last column.
    """
    is_image = input_ids == image_token_id
    counts = torch.where(is_image, times, 1)
    ends = counts.cumsum(dim=1)  # [B, T]
    held = _held_on_the_left(attention_mask, segment_ids)
    lengths = ends[:, -1:] if held is None else (ends * (held | is_image)).amax(dim=1, keepdim=True)
    longest = row_length(int(lengths.max()), segment_ids)
    shift = longest - lengths if held is None else torch.zeros_like(lengths)
    place = torch.arange(longest, device=input_ids.device) - shift  # [B, X]
    valid = (place >= 0) & (place < lengths)
    source = torch.searchsorted(ends, place.contiguous(), right=True).clamp_max(input_ids.shape[1] - 1)

    def moved(values: Tensor, other: int) -> Tensor:
        return torch.where(valid, values.gather(1, source), other)

    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    first = place == (ends - counts).gather(1, source)
    return Expanded(
        moved(input_ids, pad),
        (ends - 1 + shift).clamp_max(longest - 1),
        moved(mask, 0),
        None if segment_ids is None else moved(segment_ids, -1),
        None if labels is None else torch.where(first, moved(labels, -100), -100),
    )


def _held_on_the_left(attention_mask: Tensor | None, segment_ids: Tensor | None) -> Tensor | None:
    """bool[B, T] of what is no padding in rows padded on the right; None for others."""
    if segment_ids is not None:
        return segment_ids >= 0
    on_the_right = attention_mask is not None and bool((attention_mask[:, -1] == 0).any())
    return attention_mask != 0 if on_the_right and attention_mask is not None else None


def contract(rows: Tensor, image_token_id: int, times: int, length: int, pad: int = 0) -> Tensor:
    """int64[B, X] rows with `times` tokens an image -> int64[B, length] with one each, their last
    `length` tokens; padded on the left."""
    is_image = rows == image_token_id
    keep = ~is_image | ((is_image.cumsum(dim=1) - 1) % times == times - 1)
    out = torch.full((len(rows), length), pad, dtype=rows.dtype, device=rows.device)
    for row, (values, kept) in enumerate(zip(rows, keep, strict=True)):
        values = values[kept][-length:]
        out[row, length - len(values) :] = values
    return out


def rows_of(kept: Tensor, last: Tensor) -> Tensor:
    """float[B, X, V] -> float[B, T, V]: what stands at `last`."""
    return kept.gather(1, rearrange(last, "b t -> b t 1").expand(-1, -1, kept.shape[2]))

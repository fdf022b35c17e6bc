"""Which image may each text token see: pure functions of token ids. Knows no other room.

B rows, T tokens, N images of all rows in the order of their <image> tokens, R runs, S slots.
An image is a flat number 0..N-1, so no row is padded to the images of another, and a beam
that copies a row copies its numbers: nothing has to be reordered.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor


def image_offsets(input_ids: Tensor, image_token_id: int) -> Tensor:
    """int64[B]: flat number of each row's first image, from int64[B, T] ids."""
    counts = (input_ids == image_token_id).sum(dim=1)
    return counts.cumsum(0) - counts


def segment_starts(segment_ids: Tensor) -> Tensor:
    """int64[B, T]: index of the first token of each token's document, in packed rows."""
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    first = torch.ones_like(segment_ids, dtype=torch.bool)
    first[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return torch.where(first, index, 0).cummax(dim=1).values


def restarting_positions(segment_ids: Tensor) -> Tensor:
    """int64[B, T]: position of each token in its own document."""
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    return index - segment_starts(segment_ids)


def immediate_image(
    input_ids: Tensor, image_token_id: int, offsets: Tensor, segment_ids: Tensor | None = None
) -> Tensor:
    """Flat number of the image that each token follows most closely, -1 before any image.

    Alayrac et al. 2022, section 2.3.1: a token attends to the image just before it; earlier
    images reach it through the LM's self-attention. The <image> token sees its own image.

    input_ids: int64[B, T]; offsets: int64[B] (`image_offsets`); segment_ids: int64[B, T], the
    document of each token of packed rows: images of others are not seen. Returns int64[B, T].
    """
    is_image = (input_ids == image_token_id).long()
    seen = is_image.cumsum(dim=1)  # images up to and including here
    others = torch.zeros_like(seen)  # those of the documents before in the same row
    if segment_ids is not None:
        others = (seen - is_image).gather(1, segment_starts(segment_ids))
    return torch.where(seen > others, seen - 1 + rearrange(offsets, "b -> b 1"), -1)


@dataclass(frozen=True)
class Runs:
    """Tokens grouped by the image that they see, so attention touches only its latents.

    image: int64[R] flat image of each run; token: int64[R, S] index into the B*T tokens, the
    slots beyond a run's end repeat its first token; slot: int64[K] and source: int64[K] say
    which of the R*S slots hold the result of which of the B*T tokens (K tokens see an image).
    """

    image: Tensor
    token: Tensor
    slot: Tensor
    source: Tensor

    @classmethod
    def of(cls, seen: Tensor) -> Runs:
        """From int64[B, T], the image each token sees (-1: none)."""
        rows = torch.arange(seen.shape[0], device=seen.device)
        source = rearrange(seen >= 0, "b t -> (b t)").nonzero().squeeze(1)  # [K]
        image = rearrange(seen, "b t -> (b t)")[source]
        row = rearrange(rows[:, None].expand_as(seen), "b t -> (b t)")[source]
        starts = torch.ones_like(image, dtype=torch.bool)  # a new row or image starts a run
        starts[1:] = (image[1:] != image[:-1]) | (row[1:] != row[:-1])
        run = starts.cumsum(0) - 1  # [K]
        first = starts.nonzero().squeeze(1)  # [R]
        place = torch.arange(len(image), device=seen.device) - first[run]
        slots = int(place.max()) + 1 if len(place) else 0
        token = source[first][:, None].repeat(1, slots)  # [R, S]
        token[run, place] = source
        return cls(image[first], token, run * slots + place, source)

    def __len__(self) -> int:
        return len(self.image)

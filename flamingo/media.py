"""Which image may each text token see: pure functions of token ids. Knows no other room.

B rows, T tokens, N images of all rows in the order of their <image> tokens, R runs, S slots,
M images that a run sees, L latents of an image.
An image is a flat number 0..N-1, so no row is padded to the images of another, and a beam
that copies a row copies its numbers: nothing has to be reordered.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from flamingo.layers import taken
from flamingo.runtime import recurring


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
    others = _images_of_others(is_image, segment_ids)
    return torch.where(seen > others, seen - 1 + rearrange(offsets, "b -> b 1"), -1)


def next_image(
    input_ids: Tensor, image_token_id: int, offsets: Tensor, segment_ids: Tensor | None = None
) -> Tensor:
    """Flat number of the first image at or after each token, -1 after the last of its document.

    For training on pages whose pictures may belong to the text before them (Alayrac et al. 2022,
    appendix A.3.2: with probability p_next). Arguments and result as in `immediate_image`.
    """
    is_image = (input_ids == image_token_id).long()
    before = is_image.cumsum(dim=1) - is_image  # images before here
    last = before + is_image
    if segment_ids is None:
        end = last[:, -1:].expand_as(last)
    else:  # images up to the end of the token's document
        ends = input_ids.shape[1] - 1 - segment_starts(segment_ids.flip(1)).flip(1)
        end = last.gather(1, ends)
    return torch.where(before < end, before + rearrange(offsets, "b -> b 1"), -1)


def first_image(
    input_ids: Tensor, image_token_id: int, offsets: Tensor, segment_ids: Tensor | None = None
) -> Tensor:
    """Flat number of the first image of each token's document, seen or not: int64[B, T].

    With `immediate_image` the range of all images before a token. Arguments as there.
    """
    is_image = (input_ids == image_token_id).long()
    return _images_of_others(is_image, segment_ids) + rearrange(offsets, "b -> b 1")


def sight(
    input_ids: Tensor,
    image_token_id: int,
    attend_to: str,
    segment_ids: Tensor | None = None,
    look_ahead: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(seen, since), int64[B, T] each: the last and the first image that each token sees.

    attend_to: "immediate", where since is None (one image), or "previous"; look_ahead:
    bool[B, T], tokens that see the *next* image instead (p_next).
    """
    arguments = (input_ids, image_token_id, image_offsets(input_ids, image_token_id), segment_ids)
    seen = immediate_image(*arguments)
    since = first_image(*arguments) if attend_to == "previous" else None
    if look_ahead is not None:
        ahead = next_image(*arguments)
        seen = torch.where(look_ahead, ahead, seen)
        since = None if since is None else torch.where(look_ahead, ahead, since)
    return seen, since


def _images_of_others(is_image: Tensor, segment_ids: Tensor | None) -> Tensor:
    """int64[B, T]: images of the documents before a token's own, in the same row."""
    if segment_ids is None:
        return torch.zeros_like(is_image)
    return (is_image.cumsum(dim=1) - is_image).gather(1, segment_starts(segment_ids))


def filled_up(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Of bool[N]: int64[K], the places that are wanted; int64[K'], these and then some that are not, up
    to a number that comes again in other steps (`runtime.recurring`) or to N."""
    mine = wanted.nonzero().squeeze(1)
    missing = recurring(len(mine)) - len(mine)
    if not missing:  # as for each new token of a generation: nothing more to look for
        return mine, mine
    return mine, torch.cat((mine, (~wanted).nonzero().squeeze(1)[:missing]))


PIECE = 32  # tokens of a run, where runs are cut
WORTH = 0.6  # of the slots of whole runs: with more left, copying latents costs what it saves


def _begins(starts: Tensor) -> Tensor:
    """bool[K], where runs of K tokens begin -> the same, or where pieces of `PIECE` tokens of them begin.

    All runs have the slots of the longest. A document's last picture is followed by ten times a caption's
    tokens: most slots would be empty.
    """
    index = torch.arange(len(starts), device=starts.device)
    first = starts.nonzero().squeeze(1)
    place = index - torch.where(starts, index, 0).cummax(0).values
    pieces = starts | (place % PIECE == 0)
    whole = len(first) * (int(place.max()) + 1) if len(place) else 0
    return pieces if int(pieces.sum()) * PIECE <= WORTH * whole else starts


@dataclass(frozen=True)
class Runs:
    """Tokens grouped by the image that they see, so attention touches only its latents; long runs in
    several pieces where others are short (`_begins`).

    image: int64[R] flat image of each run; source: int64[K], which of the B*T tokens see an image;
    member: int64[R, S] index into these K tokens, the slots beyond a run's end repeat its first
    token; slot: int64[K], which of the R*S slots is a token's own; filled: bool[R, S], slots that are
    any token's. rows, places: int64[K'], `source` and `slot` filled up to a number that comes again in
    other steps (`runtime.recurring`), with tokens that see no image and any slot.
    """

    image: Tensor
    source: Tensor
    member: Tensor
    slot: Tensor
    filled: Tensor
    rows: Tensor
    places: Tensor
    images: Tensor | None = None  # int64[R, M]: all images that a run sees, -1 beyond the last
    in_order: bool = False  # run i sees image i

    @classmethod
    def of(cls, seen: Tensor, since: Tensor | None = None) -> Runs:
        """From int64[B, T], the image each token sees (-1: none).

        since: int64[B, T], the first image that a token sees, where it sees all from there on to
        `seen` and not that one only.
        """
        source, rows = filled_up(rearrange(seen >= 0, "b t -> (b t)"))  # [K], [K']
        image = rearrange(seen, "b t -> (b t)")[source]
        row = source // max(1, seen.shape[1])
        starts = torch.ones_like(image, dtype=torch.bool)  # a new row or image starts a run
        starts[1:] = (image[1:] != image[:-1]) | (row[1:] != row[:-1])
        starts = _begins(starts)
        run = starts.cumsum(0) - 1  # [K]
        first = starts.nonzero().squeeze(1)  # [R]
        place = torch.arange(len(image), device=seen.device) - first[run]
        slots = recurring(int(place.max()) + 1) if len(place) else 0
        member = first[:, None].repeat(1, slots)  # [R, S]
        member[run, place] = torch.arange(len(image), device=seen.device)
        filled = torch.zeros_like(member, dtype=torch.bool)
        filled[run, place] = True
        images = None
        if since is not None:
            begin = rearrange(since, "b t -> (b t)")[source][first]  # [R]
            many = int((image[first] - begin).max()) + 1 if len(first) else 0
            images = begin[:, None] + torch.arange(many, device=seen.device)  # [R, M]
            images = torch.where(images <= image[first][:, None], images, -1)
        image = image[first]
        in_order = torch.equal(image, torch.arange(len(image), device=image.device))
        slot = run * slots + place
        places = F.pad(slot, (0, len(rows) - len(source)))
        return cls(image, source, member, slot, filled, rows, places, images, in_order)

    @property
    def token(self) -> Tensor:
        """int64[R, S]: which of the B*T tokens each slot holds."""
        return self.source[self.member]

    def spread(self, x: Tensor) -> Tensor:
        """float[K, W] or more of the tokens that see an image, the others last -> float[R, S, W]."""
        mine = x[: len(self.source)]
        return taken(mine, self.member.flatten(), self.slot).view(*self.member.shape, -1)

    def joined(self, x: Tensor) -> Tensor:
        """float[R, S, W] -> float[K', W]: each token from its own slot, the others from any."""
        flat = rearrange(x, "r s w -> (r s) w")
        return taken(flat, self.places, self.member.flatten(), self.filled.flatten())

    def gather(self, per_image: Tensor) -> Tensor:
        """float[N, H, L, D] of all images -> float[R, H, M*L, D] of those that each run sees."""
        if self.images is None:
            if self.in_order and len(per_image) == len(self.image):
                return per_image  # nothing to gather, and no gradients to add up
            return per_image.index_select(0, self.image)
        return rearrange(per_image[self.images.clamp_min(0)], "r m h l d -> r h (m l) d")

    def mask(self, latents: int) -> Tensor | None:
        """bool[R, 1, 1, M*L]: which of the gathered latents are an image's; None: all."""
        if self.images is None or bool((self.images >= 0).all()):
            return None
        return repeat(self.images >= 0, "r m -> r 1 1 (m l)", l=latents)

    def __len__(self) -> int:
        return len(self.image)

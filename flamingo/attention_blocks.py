"""Which tokens of packed rows compare with each other, found in the attention mask.

Documents of a packed row do not see each other, so most of the row's pairs of tokens are masked.
Here whole documents are gathered into blocks about as long as the longest, and only pairs
within a block are computed.
B rows, T tokens, H heads, D head width, M blocks of S places.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from flamingo.layers import taken

WORTH = 0.6  # of the pairs of whole rows: with more left, gathering costs what it saves


@dataclass(frozen=True)
class Blocks:
    """Attributes:
    tokens: int64[M, S], the number of the token (row by row) at each place; 0 at unused places.
    places: int64[B*T], the place of each token. used: bool[M, S].
    mask: float[M, 1, S, S], added to the scores. causal: whether no place sees one after itself.
    """

    tokens: Tensor
    places: Tensor
    used: Tensor
    mask: Tensor
    causal: bool

    def gather(self, x: Tensor) -> Tensor:
        """float[B, H, T, D] -> float[M, H, S, D]."""
        flat = rearrange(x, "b h t d -> (b t) (h d)")
        moved = taken(flat, self.tokens.flatten(), self.places)
        return rearrange(moved, "(m s) (h d) -> m h s d", m=len(self.tokens), h=x.shape[1])

    def scatter(self, x: Tensor, rows: int) -> Tensor:
        """float[M, H, S, D] -> float[B, T, H, D]."""
        flat = rearrange(x, "m h s d -> (m s) (h d)")
        moved = taken(flat, self.places, self.tokens.flatten(), self.used.flatten())
        return rearrange(moved, "(b t) (h d) -> b t h d", b=rows, h=x.shape[1])


_FOUND: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_CAUSAL: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def blocks_of(mask: Tensor) -> Blocks | None:
    """Blocks of float[B or 1, 1, T, T], which is added to scores; None where whole rows are as well.

    All layers of a pass get the same mask: what was found is kept as long as that lives.
    """
    if mask not in _FOUND:
        _FOUND[mask] = _find(mask)
    return _FOUND[mask]


def is_causal(mask: Tensor) -> bool:
    """Whether no query of float[B, 1, T, C] sees a key after itself; asked once per mask, as all layers
    of a pass get the same."""
    if mask not in _CAUSAL:
        queries, keys = mask.shape[2:]
        after = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).triu(keys - queries + 1)
        _CAUSAL[mask] = not bool(((mask > torch.finfo(mask.dtype).min / 2) & after).any())
    return _CAUSAL[mask]


def whole_rows(mask: Tensor) -> Blocks:
    """Each row of float[B, 1, T, T] as a block of its own."""
    places = torch.arange(mask.shape[0] * mask.shape[2], device=mask.device)
    tokens = rearrange(places, "(b t) -> b t", b=mask.shape[0]).clone()  # a view would be a graph of its own
    used = torch.ones_like(tokens, dtype=torch.bool)
    return Blocks(tokens, places, used, mask.clone(), is_causal(mask))


@torch.no_grad()
def _find(mask: Tensor) -> Blocks | None:
    lowest = torch.finfo(mask.dtype).min
    seen = rearrange(mask > lowest / 2, "b 1 q k -> b q k")
    index = torch.arange(seen.shape[1], device=mask.device)
    first = torch.where(seen.any(-1), seen.int().argmax(-1), index)  # int64[B, T]
    # A document begins where neither this token nor any later one sees what is before.
    starts = first.flip(1).cummin(1).values.flip(1) >= index
    blocks = _filled(starts)
    longest = max(map(len, blocks))
    if len(blocks) * longest**2 > WORTH * seen.numel():
        return None
    tokens = torch.zeros(len(blocks), longest, dtype=torch.int64, device=mask.device)
    used = torch.zeros_like(tokens, dtype=torch.bool)
    places = torch.empty(starts.numel(), dtype=torch.int64, device=mask.device)
    for number, block in enumerate(blocks):
        held = torch.tensor(block, device=mask.device)
        tokens[number, : len(block)], used[number, : len(block)] = held, True
        places[held] = number * longest + torch.arange(len(block), device=mask.device)
    row, place = tokens // len(index), tokens % len(index)
    inner = mask[:, 0][row[:, :, None], place[:, :, None], place[:, None, :]]  # [M, S, S]
    inner = inner.masked_fill(~used[:, None, :], lowest)
    inner = rearrange(inner, "m q k -> m 1 q k")
    return Blocks(tokens, places, used, inner, is_causal(inner))


def _filled(starts: Tensor) -> list[list[int]]:
    """bool[B, T], where documents begin -> numbers of the tokens of each block: documents of one
    row that follow each other, up to the length of the longest of all rows."""
    begins = starts.flatten().nonzero().squeeze(1).tolist()
    spans = list(zip(begins, [*begins[1:], starts.numel()], strict=True))
    longest = max(end - begin for begin, end in spans)
    blocks: list[list[int]] = []
    for begin, end in spans:
        if begin % starts.shape[1] and len(blocks[-1]) + end - begin <= longest:
            blocks[-1].extend(range(begin, end))
        else:
            blocks.append(list(range(begin, end)))
    return blocks

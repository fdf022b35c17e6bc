"""A batch of prompts within the LM: laid out, read, written on, branched from.

B rows, T tokens of a batch, P tokens of a prefix that all rows share, C columns so far, M nodes of
a tree, V vocabulary, H heads, D head width of the LM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from flamingo.cache import SightLayer
from flamingo.eval.images import Images, Picture
from flamingo.media import sight
from flamingo.modeling import FlamingoForConditionalGeneration


@dataclass
class Row:
    """Tokens that are computed for one or more equal prompts (`owners`), and their pictures."""

    ids: list[int]
    images: tuple[Picture, ...]
    owners: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Shared:
    """What stands before every row, computed once: per LM layer keys, values float[1, H, P, D]."""

    ids: list[int]
    images: tuple[Picture, ...]
    layers: tuple[tuple[Tensor, Tensor], ...]

    def cache(self) -> DynamicCache:
        cache = DynamicCache()
        cache.layers.extend(SharedLayer(keys, values) for keys, values in self.layers)
        return cache


class SharedLayer(DynamicLayer):
    """Keys and values of a prefix, kept once, before those of each row: float[B, H, C, D]."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.shared = (keys, values)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        own = super().update(key_states, value_states, *args, **kwargs)
        before = (x.expand(len(key_states), -1, -1, -1) for x in self.shared)
        keys, values = (torch.cat(pair, dim=2) for pair in zip(before, own, strict=True))
        return keys, values

    def get_seq_length(self) -> int:
        return self.shared[0].shape[2] + super().get_seq_length()

    @property
    def own(self) -> bool:
        return self.is_initialized and bool(self.keys.numel())  # type: ignore[union-attr]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.own:
            super().reorder_cache(beam_idx)  # type: ignore[arg-type]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.own:
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.own:
            super().batch_select_indices(indices)


class State:
    """Rows of a batch, padded on the left, and how far the LM has read them.

    The prefix, where there is one, stands before the padding: `[prefix | padding | row]`.
    """

    def __init__(
        self,
        model: FlamingoForConditionalGeneration,
        images: Images,
        rows: Sequence[Row],
        shared: Shared | None = None,
        plain_cache: bool = True,
    ):
        """plain_cache: the LM keeps keys and values only; else it makes a cache of its own kind."""
        self.model, self.images, self.rows, self.plain_cache = model, images, list(rows), plain_cache
        self.before = before = shared or Shared([], (), ())
        pad = partial(pad_sequence, batch_first=True, padding_side="left")
        ids = pad([torch.tensor(row.ids) for row in rows]).to(model.device)
        mask = pad([torch.ones(len(row.ids), dtype=torch.int64) for row in rows]).to(model.device)
        first = torch.tensor(before.ids, dtype=torch.int64, device=model.device).expand(len(rows), -1)
        self.whole = torch.cat((first, ids), dim=1)  # int64[B, P + T]
        self.mask = torch.cat((torch.ones_like(first), mask), dim=1)  # of all columns, read or not
        self.padded = not bool(mask.all())
        self.positions = (self.mask.cumsum(dim=1) - 1).clamp_min(0)
        self.columns = len(before.ids)  # that the LM has read
        pictures = [image for row in rows for image in (*before.images, *row.images)]
        self.seen, self.since = sight(self.whole, model.config.image_token_id, model.config.attend_to)
        self.seen = self.seen.masked_fill(self.mask == 0, -1)
        self.media = None
        if pictures:
            places = images.places(pictures)
            assert images.media is not None
            if self.since is None:  # a token sees one picture: its number in the table will do
                self.media = images.media
                self.seen = torch.where(self.seen >= 0, places[self.seen.clamp_min(0)], -1)
            else:  # a row's pictures are a range of numbers
                self.media = images.media.pick(places)
        self.cache: Any = shared.cache() if shared else DynamicCache() if plain_cache else None

    def __len__(self) -> int:
        return len(self.whole)

    def read(self, last: int = 1, keep: bool = True, until: int | None = None) -> Tensor:
        """Reads what was not read yet, or the columns before `until`; the logits after the `last`
        ones of these, float[B, last, V].

        keep: more will be read; else keys and values are not kept.
        """
        part = slice(self.columns, until)
        ids, positions, seen = (x[:, part] for x in (self.whole, self.positions, self.seen))
        since = None if self.since is None else self.since[:, part]
        mask = self.mask[:, :until] if self.padded else None
        self.columns += ids.shape[1]
        return self._run(ids, positions, seen, since, mask, last, keep)

    def step(self, tokens: Tensor) -> Tensor:
        """int64[B], one more token of each row -> float[B, V]."""
        self.whole = torch.cat((self.whole, tokens[:, None]), dim=1)
        self.mask = torch.cat((self.mask, torch.ones_like(tokens)[:, None]), dim=1)
        self.positions = torch.cat((self.positions, self.positions[:, -1:] + 1), dim=1)
        self.seen = torch.cat((self.seen, self.seen[:, -1:]), dim=1)  # it cannot be <image>
        self.since = None if self.since is None else torch.cat((self.since, self.since[:, -1:]), dim=1)
        return self.read()[:, 0]

    def select(self, rows: list[int]) -> None:
        """Go on with these rows only."""
        index = torch.tensor(rows, device=self.whole.device)
        self.whole, self.mask, self.positions, self.seen = (
            x[index] for x in (self.whole, self.mask, self.positions, self.seen)
        )
        self.since = None if self.since is None else self.since[index]
        self.rows = [self.rows[row] for row in rows]
        self.cache.batch_select_indices(index)

    def branch(self, tokens: Tensor, above: Tensor) -> Tensor:
        """Logits after each node of a tree that goes on from every row: float[B, M, V].

        tokens: int64[M], the nodes' tokens; above: bool[M, M], which nodes each has on its way from
        the root, itself included. All are read in one pass, each seeing its own way only, and then
        forgotten. For LMs that know tokens by their positions (`columns_are_free`).
        """
        rows, nodes = len(self), len(tokens)
        dtype = self.model.get_input_embeddings().weight.dtype
        sees = torch.cat(
            (
                rearrange(self.mask.bool(), "b c -> b 1 c").expand(-1, nodes, -1),
                rearrange(above, "m n -> 1 m n").expand(rows, -1, -1),
            ),
            dim=2,
        )
        mask = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
        mask = rearrange(mask.masked_fill_(~sees, torch.finfo(dtype).min), "b m c -> b 1 m c")
        positions = self.positions[:, -1:] + above.sum(dim=1)
        seen, since = (None if x is None else x[:, -1:].expand(-1, nodes) for x in (self.seen, self.since))
        logits = self._run(tokens.expand(rows, -1), positions, seen, since, mask, nodes)
        self.cache.crop(-nodes)
        return logits

    def row(self, number: int) -> Row:
        """A row with what stands before it."""
        row = self.rows[number]
        return Row(self.before.ids + row.ids, self.before.images + row.images)

    def after(self, number: int) -> Shared:
        """What was read of one row, as a prefix of others; for a cache of keys and values."""
        kept = self.mask[number, : self.columns].bool().nonzero().squeeze(1)
        layers = []
        for layer in self.layers():
            pair = (layer.keys[number : number + 1], layer.values[number : number + 1])
            if isinstance(layer, SharedLayer):
                pair = tuple(torch.cat(both, dim=2) for both in zip(layer.shared, pair, strict=True))
            layers.append(tuple(x[:, :, kept] for x in pair))
        row = self.row(number)
        return Shared(row.ids, row.images, tuple(layers))

    def layers(self) -> list[Any]:
        """Of the cache, without that of the images."""
        return [layer for layer in self.cache.layers if not isinstance(layer, SightLayer)]

    def _run(self, ids, positions, seen, since, mask, last: int, keep: bool = True) -> Tensor:
        fresh = self.columns == ids.shape[1]
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            media=self.media,
            seen=seen,
            since=since,
            logits_to_keep=last,
            cache=None if fresh and not keep else self.cache,
            use_cache=keep or not fresh,
        )
        self.cache = out.cache if keep else None
        assert out.logits is not None
        return out.logits


def keeps_keys_and_values(model: FlamingoForConditionalGeneration) -> bool:
    """Whether an LM's state is keys and values of all tokens, so that prefixes can be shared."""
    layers = DynamicCache(config=model.config.get_text_config()).layers
    return all(isinstance(layer, DynamicLayer) for layer in layers)


@torch.inference_mode()
def columns_are_free(model: FlamingoForConditionalGeneration) -> bool:
    """Whether only positions tell an LM where tokens are, so that gaps and branches mean nothing:
    asked of the LM itself, with what must not matter in the gap."""
    text = model.config.get_text_config()
    layers = DynamicCache(config=text).layers
    if getattr(text, "alibi", False) or any(getattr(layer, "is_sliding", False) for layer in layers):
        return False
    if not model._takes_positions or not keeps_keys_and_values(model):
        return False
    ids = [n % model.config.first_added_token_id for n in range(1, 16)]
    device = model.device
    plain = model(torch.tensor([ids[:6] + ids[14:]], device=device), use_cache=False, logits_to_keep=1).logits
    above = torch.eye(9, dtype=torch.bool, device=device)  # eight that lead nowhere, and the one
    try:
        state = State(model, Images(model, lambda x: x), [Row(ids[:6], ())])
        state.read()
        found = state.branch(torch.tensor(ids[6:], device=device), above)[:, -1]
    except (TypeError, ValueError, RuntimeError, IndexError):  # an LM that takes no such mask
        return False
    difference = (found - plain[:, 0]).float().norm()
    rounding = 1e-3 if found.dtype == torch.float32 else 0.02
    return bool(difference < rounding * plain.float().norm())

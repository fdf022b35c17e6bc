"""Generation: images are encoded and projected once, prefixes are computed once.

B rows, T tokens, P tokens of a prefix, C of them in a cache, N images of all rows, H heads,
D head width of the LM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer

from flamingo.cache import SightLayer
from flamingo.expansion import contract
from flamingo.media import sight


@dataclass(frozen=True)
class Prefix:
    """A few-shot prompt that many queries share, computed once (`model.prefix`).

    input_ids: int64[1, P], as the LM reads it; short: int64[1, T], with one token an image; media: its
    images; states: per LM layer keys, values float[1, H, P, D].
    Never changed: what generation adds, it adds to copies.
    """

    input_ids: Tensor
    short: Tensor
    media: Any
    states: tuple[tuple[Tensor, Tensor], ...]

    def __len__(self) -> int:
        return self.input_ids.shape[1]

    def cache(self, padding: Tensor, columns: int, times: int) -> DynamicCache:
        """The first `columns` of rows that begin with padding: int64[B] tokens and the prefix.

        Each row `times` times, for beams. Padded columns hold anything: the mask hides them.
        """
        index = torch.arange(columns, device=padding.device) - rearrange(padding, "b -> b 1")
        index = index.clamp_min(0).repeat_interleave(times, dim=0)  # [B, C]
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self.states):
            keys, values = (rearrange(x[0][:, index], "h b c d -> b h c d") for x in (keys, values))
            cache.update(keys, values, layer)
        return cache


class FlamingoGeneration(GenerationMixin):
    """`generate` of transformers, for a model that sees."""

    def generate(self, inputs=None, *, pixel_values=None, media=None, frames=None, prefix=None, **kwargs):  # type: ignore[override]
        """As in transformers; images are encoded and projected once, before the first token.

        input_ids: int64[B, T], left-padded; pixel_values: float[N, 3, H, W], clips with `frames`
        as in `forward`, or media (`media()`). prefix: what stands before every row (`prefix()`);
        input_ids, attention_mask and the images are then those after it. What is returned holds the
        prefix too, after the padding.
        """
        model: Any = self
        input_ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
        if input_ids is None:
            raise ValueError("input_ids is missing: a Flamingo finds its images by their tokens")
        with torch.no_grad():
            if media is None and pixel_values is not None and len(pixel_values):
                media = model.media(pixel_values=pixel_values, frames=frames)
        short = (
            input_ids
            if prefix is None
            else torch.cat((prefix.short.expand(len(input_ids), -1), input_ids), 1)
        )
        if model.is_short(input_ids, media) or (prefix is not None and model.image_tokens > 1):
            long = model.expand(input_ids, kwargs.get("attention_mask"))
            if bool((long.attention_mask[:, -1] == 0).any()):
                raise ValueError("attention_mask: rows to be continued are padded on the left")
            input_ids, kwargs["attention_mask"] = long.input_ids, long.attention_mask
        seen, since = model.sight(input_ids, media)
        if prefix is not None:
            input_ids, seen, since, media = self._after(prefix, input_ids, media, kwargs)
        if since is not None:
            kwargs["since"] = since
        kwargs.setdefault("eos_token_id", self._stop_tokens(kwargs.get("generation_config")))
        suppressed = list(kwargs.pop("suppress_tokens", None) or [])
        suppressed.append(model.config.image_token_id)
        out = super().generate(  # type: ignore[misc]
            input_ids, media=media, seen=seen, suppress_tokens=suppressed, **kwargs
        )
        return out if short.shape == input_ids.shape else self._as_asked(out, input_ids, short)

    def _as_asked(self, out: Any, read: Tensor, asked: Tensor) -> Any:
        """What was generated, behind rows with one <image> token an image, int64[B, T], as they were
        asked, instead of int64[B, X], as the LM read them."""
        model: Any = self
        sequences = out if isinstance(out, Tensor) else out.sequences
        length = asked.shape[1] + sequences.shape[1] - read.shape[1]
        pad = self.generation_config.pad_token_id or 0  # type: ignore[attr-defined]
        token = model.config.image_token_id
        sequences = contract(sequences, token, model.image_tokens, length, pad)
        if isinstance(out, Tensor):
            return sequences
        out.sequences = sequences
        return out

    @torch.no_grad()
    def prefix(self, input_ids: Tensor, pixel_values: Tensor | None = None, frames=None) -> Prefix:
        """Compute what many queries have in common: int64[1, P] and its images, in one row.

        Raises ValueError for more than one row, or an LM that keeps more than keys and values.
        """
        model: Any = self
        if len(input_ids) != 1:
            raise ValueError(f"a prefix is one row, input_ids has {len(input_ids)}")
        kinds = {type(layer) for layer in DynamicCache(config=model.config.get_text_config()).layers}
        odd = [kind.__name__ for kind in kinds if not issubclass(kind, DynamicLayer)]
        if odd:
            raise ValueError(f"this LM's state ({', '.join(odd)}) cannot be shared: give rows whole prompts")
        media = None
        if pixel_values is not None and len(pixel_values):
            media = model.media(pixel_values=pixel_values, frames=frames)
        short = input_ids
        if model.is_short(input_ids, media):
            input_ids = model.expand(input_ids).input_ids
        # Without the LM's config all layers keep all tokens, also those with a sliding window: a
        # row whose query is short has its last tokens of the prefix computed again.
        cache = DynamicCache()
        model(input_ids=input_ids, media=media, logits_to_keep=1, use_cache=True, cache=cache)
        layers: list[Any] = [layer for layer in cache.layers if not isinstance(layer, SightLayer)]
        return Prefix(input_ids, short, media, tuple((layer.keys, layer.values) for layer in layers))

    def _after(self, prefix: Prefix, input_ids: Tensor, media: Any, kwargs: dict) -> tuple:
        """(input_ids, seen, since, media) of the whole rows: padding, prefix, query.

        So they are as if there were no cache, which holds all columns but the last ones: LMs that
        count distances in columns (ALiBi, sliding windows) see no gap. Raises ValueError for
        queries that are not padded on the left.
        """
        model: Any = self
        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        if bool((mask[:, 1:] < mask[:, :-1]).any()):
            raise ValueError("attention_mask: queries after a prefix are padded on the left")
        padding = (mask == 0).sum(dim=1)  # [B]
        rows, length = len(input_ids), len(prefix)
        columns = torch.arange(length + input_ids.shape[1], device=input_ids.device)
        pad = rearrange(padding, "b -> b 1")
        source = torch.where(columns < pad + length, columns - pad, columns)
        source = torch.where(columns < pad, columns + length, source)  # the padding goes first
        whole = torch.cat((prefix.input_ids.expand(rows, -1), input_ids), dim=1).gather(1, source)
        kwargs["attention_mask"] = torch.cat((mask.new_ones(rows, length), mask), dim=1).gather(1, source)
        cached = min(length, whole.shape[1] - 1)  # generation begins with at least one token
        kwargs["cache"] = prefix.cache(padding, cached, self._copies(kwargs))
        attend_to = model.config.attend_to
        seen, since = sight(whole, model.config.image_token_id, attend_to)
        media, numbers = self._shared(prefix, input_ids, media)
        if media is None:
            return whole, seen, since, None
        if since is not None:  # a row's images are a range of numbers
            return whole, seen, since, media.pick(numbers)
        return whole, torch.where(seen >= 0, numbers[seen], -1), None, media

    def _shared(self, prefix: Prefix, input_ids: Tensor, media: Any) -> tuple:
        """The prefix's images and then the rows' own, and where among them the images of all rows
        are, int64[N], were the prefix's to stand in each row."""
        model: Any = self
        before = 0 if prefix.media is None else len(prefix.media)
        numbers, start = [], before
        for own in (input_ids == model.config.image_token_id).sum(dim=1).tolist():
            numbers += [*range(before), *range(start, start + own)]
            start += own
        both = media if prefix.media is None else prefix.media.joined(prefix.media, media)
        return both, torch.tensor(numbers, device=input_ids.device)

    def _copies(self, kwargs: dict) -> int:
        """How often generation repeats each row: for its beams or samples."""
        config = kwargs.get("generation_config") or self.generation_config  # type: ignore[attr-defined]
        names = ("num_beams", "num_return_sequences")
        return max(kwargs.get(name) or getattr(config, name, None) or 1 for name in names)

    def _stop_tokens(self, generation_config) -> list[int]:
        model: Any = self
        eos = (generation_config or self.generation_config).eos_token_id
        eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        return list(dict.fromkeys([*eos, model.config.end_of_chunk_token_id]))

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Any, seen: Any = None, since: Any = None, **kwargs
    ):
        """New tokens see what the last prompt token saw (they cannot be <image>)."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)  # type: ignore[misc]
        new = inputs["input_ids"].shape[1]
        for name, numbers in (("seen", seen), ("since", since)):
            if numbers is None:
                continue
            missing = input_ids.shape[1] - numbers.shape[1]
            if missing > 0:
                numbers = torch.cat((numbers, numbers[:, -1:].expand(-1, missing)), dim=1)
            # Assisted decoding may look at fewer tokens than there are: the end is at input_ids'.
            inputs[name] = numbers[:, : input_ids.shape[1]][:, -new:]
        return inputs

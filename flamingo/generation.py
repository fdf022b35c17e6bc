"""Generation: images are encoded and projected once, prefixes are computed once.

B rows, T tokens, P tokens of a prefix, N images of all rows.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from einops import repeat
from torch import Tensor
from transformers import GenerationMixin

from flamingo.cross_attention import Media


@dataclass(frozen=True)
class Prefix:
    """A few-shot prompt that many queries share, computed once (`model.prefix`).

    input_ids, seen: int64[1, P]; since: int64[1, P] or None; media: its images; cache: the LM's.
    """

    input_ids: Tensor
    seen: Tensor
    since: Tensor | None
    media: Media | None
    cache: Any


class FlamingoGeneration(GenerationMixin):
    """`generate` of transformers, for a model that sees."""

    def generate(self, inputs=None, *, pixel_values=None, media=None, frames=None, prefix=None, **kwargs):  # type: ignore[override]
        """As in transformers; images are encoded and projected once, before the first token.

        input_ids: int64[B, T], left-padded; pixel_values: float[N, 3, H, W], clips with `frames`
        as in `forward`, or media (`media()`). prefix: what stands before every row (`prefix()`);
        input_ids and the images are then those after it. What is returned holds the prefix too.
        """
        model: Any = self
        input_ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
        if input_ids is None:
            raise ValueError("input_ids is missing: a Flamingo finds its images by their tokens")
        with torch.no_grad():
            if media is None and pixel_values is not None and len(pixel_values):
                media = model.media(pixel_values=pixel_values, frames=frames)
        seen, since = model.sight(input_ids, media)
        if prefix is not None:
            input_ids, seen, since, media = self._after(prefix, input_ids, seen, since, media, kwargs)
        if since is not None:
            kwargs["since"] = since
        kwargs.setdefault("eos_token_id", self._stop_tokens(kwargs.get("generation_config")))
        suppressed = list(kwargs.pop("suppress_tokens", None) or [])
        suppressed.append(model.config.image_token_id)
        return super().generate(  # type: ignore[misc]
            input_ids, media=media, seen=seen, suppress_tokens=suppressed, **kwargs
        )

    @torch.no_grad()
    def prefix(self, input_ids: Tensor, pixel_values: Tensor | None = None, frames=None) -> Prefix:
        """Compute what many queries have in common: int64[1, P] and its images, in one row.

        Raises ValueError for more than one row.
        """
        model: Any = self
        if len(input_ids) != 1:
            raise ValueError(f"a prefix is one row, input_ids has {len(input_ids)}")
        media = None
        if pixel_values is not None and len(pixel_values):
            media = model.media(pixel_values=pixel_values, frames=frames)
        seen, since = model.sight(input_ids, media)
        cache = model(
            input_ids=input_ids, media=media, seen=seen, since=since, logits_to_keep=1, use_cache=True
        ).past_key_values
        return Prefix(input_ids, seen, since, media, cache)

    def _after(self, prefix: Prefix, input_ids, seen, since, media, kwargs) -> tuple:
        """The whole rows, whose images are numbered after the prefix's, which all rows share."""
        rows, before = len(input_ids), 0 if prefix.media is None else len(prefix.media)
        last = int(prefix.seen[0, -1])
        seen = torch.where(seen >= 0, seen + before, last)  # text first: still the prefix's image
        seen = torch.cat((prefix.seen.expand(rows, -1), seen), dim=1)
        if since is not None:
            # The images of a row would not be a range: those of the rows before lie between.
            raise ValueError(
                'a prefix needs attend_to="immediate": with "previous" give each row its whole prompt'
            )
        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        ones = mask.new_ones(rows, prefix.input_ids.shape[1])
        kwargs["attention_mask"] = torch.cat((ones, mask), dim=1)
        kwargs["past_key_values"] = copy.deepcopy(prefix.cache)
        kwargs["past_key_values"].batch_repeat_interleave(rows)
        input_ids = torch.cat((repeat(prefix.input_ids, "1 p -> b p", b=rows), input_ids), dim=1)
        return input_ids, seen, None, Media.joined(prefix.media, media)

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

"""What the images leave in the LM's cache, so that a cached continuation sees them too.

The keys and values of the images and the image that each cached token sees are one more layer of
the transformers cache, after the LM's own: what reorders, repeats, selects or crops the cache does
it to them as well. B rows, C cached tokens, T new tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from flamingo.cross_attention import Media


class SightLayer(CacheLayerMixin):
    """media: the images; seen, since: int64[B, C], as in `media.sight`. The LM never asks for it."""

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, media: Media | None, seen: Tensor, since: Tensor | None):
        super().__init__()
        self.is_initialized = True
        self.media, self.seen, self.since = media, seen, since

    @classmethod
    def of(cls, cache: Any) -> SightLayer | None:
        """The layer that a cache holds, if it holds one."""
        layers = cache.layers if isinstance(cache, Cache) else []
        return layers[-1] if layers and isinstance(layers[-1], cls) else None

    @classmethod
    def keep(cls, cache: Any, media: Media | None, seen: Tensor, since: Tensor | None) -> None:
        """After a pass over T tokens: int64[B, T] is added to what the cache holds."""
        held = cls.of(cache)
        if held is not None:
            held.media = media
            held.seen = torch.cat((held.seen, seen), dim=1)
            held.since = None if since is None or held.since is None else torch.cat((held.since, since), 1)
        elif isinstance(cache, Cache):
            cache.layers.append(cls(media, seen, since))

    def then(
        self, media: Media | None, seen: Tensor, since: Tensor | None
    ) -> tuple[Media | None, Tensor, Tensor | None]:
        """What new tokens see: their own images (media, int64[B, T]), before these the last cached one.

        Raises ValueError where several rows that attend to all previous images get more of them:
        a row's images would not stand together.
        """
        if not self.seen.shape[1]:
            return media, seen, since
        before = 0 if self.media is None else len(self.media)
        last = self.seen[:, -1:]
        if since is not None:
            assert self.since is not None
            if before and media is not None and len(media) and len(seen) > 1:
                raise ValueError(
                    'attend_to="previous": new images for several cached rows at once; '
                    "continue the rows one by one, or give whole prompts"
                )
            first = torch.where(last >= 0, self.since[:, -1:], since + before)
            since = first.expand_as(seen)
        seen = torch.where(seen >= 0, seen + before, last)
        return Media.joined(self.media, media), seen, since

    # -- what happens to a cache ---------------------------------------------------------

    def _select(self, rows: Tensor) -> None:
        self.seen = self.seen[rows.to(self.seen.device)]
        self.since = None if self.since is None else self.since[rows.to(self.since.device)]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(torch.arange(len(self.seen)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget so many last tokens (a negative number, as in transformers)."""
        keep = max(0, self.seen.shape[1] - abs(tokens_to_remove))
        self.seen = self.seen[:, :keep]
        self.since = None if self.since is None else self.since[:, :keep]

    def reset(self) -> None:
        self.crop(-self.seen.shape[1])
        self.media = None

    def get_seq_length(self) -> int:
        return self.seen.shape[1]

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    # Numbers of images take no room, and their keys and values are read at every token.
    def offload(self) -> None:
        pass

    def prefetch(self) -> None:
        pass

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        raise AssertionError("the LM has more layers than its cache")

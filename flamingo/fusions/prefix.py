"""An image's vectors stand in the LM's input, in the place of its <image> token.

As in Frozen (Tsimpoukelli et al. 2021) and LLaVA (Liu et al. 2023): the LM's own attention looks at
them as at words. In its input an image has as many <image> tokens as vectors.
B rows, T tokens, N images, L vectors of an image, K = N * L, W LM width, P places of a grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from flamingo.config import FlamingoConfig
from flamingo.decoder import Conditioning


@dataclass(frozen=True)
class Vectors:
    """latents: float[N, L, W]. Counted and picked by vector, each one <image> token."""

    latents: Tensor

    @property
    def flat(self) -> Tensor:
        return rearrange(self.latents, "n l w -> (n l) w")

    def __len__(self) -> int:
        return self.latents.shape[0] * self.latents.shape[1]

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """As of `Media`: tensors whose first dimension counts images."""
        return (self.latents,)

    def of_tables(self, tables: tuple[Tensor, ...]) -> Vectors:
        """The same of other tensors."""
        return Vectors(tables[0])

    def pick(self, index: Tensor) -> Vectors:
        """The vectors of int64[M], in that order."""
        return Vectors(rearrange(self.flat[index], "k w -> k 1 w"))

    @classmethod
    def joined(cls, first: Vectors | None, second: Vectors | None) -> Vectors | None:
        if first is None or second is None:
            return first or second
        return cls(rearrange(torch.cat((first.flat, second.flat)), "k w -> k 1 w"))


class Fusion:
    """Nothing stands between the LM's layers."""

    between = False
    kept = False  # the LM's own keys and values hold the images

    def __init__(self, config: FlamingoConfig):
        self.token, self.scale = config.image_token_id, config.connector_scale

    def width(self, embedding_width: int) -> int:
        return embedding_width

    def image_tokens(self, count: int) -> int:
        return count

    def values(self, config: FlamingoConfig, count: int, width: int) -> int:
        return count * width

    def blocks(self, config: FlamingoConfig, text_width: int, connector_width: int) -> nn.ModuleList:
        return nn.ModuleList()

    def media(self, blocks: nn.ModuleList, latents: Tensor) -> Vectors:
        return Vectors(latents * self.scale)

    def conditioning(
        self, media: Vectors | None, ids: Tensor, seen: Tensor, since: Tensor | None, keep: Tensor | None
    ) -> Conditioning:
        """seen counts vectors: an <image> token is the one that it sees itself."""
        vectors = None if media is None else media.flat[seen[ids == self.token].clamp_min(0)]
        return Conditioning(None, None, keep, image_token=self.token, vectors=vectors)

    def looks(
        self, model: Any, ids: Tensor, mask: Tensor | None, seen: Tensor, since: Tensor | None,
        media: Vectors, places: Tensor,
    ) -> Tensor:  # fmt: skip
        """float32[B, T, N, P]: the LM's attention to an image's vectors, mean over heads and layers,
        composed with the connector's float32[N, L, P]; a token's sum to 1."""
        with model._decoder.conditioned(self.conditioning(media, ids, seen, since, None)), _eager(model):
            out = model.language_model(
                input_ids=ids, attention_mask=mask, use_cache=False, output_attentions=True
            )
        whole = torch.stack([layer.float().mean(dim=1) for layer in out.attentions]).sum(dim=0)  # [B, T, T]
        images, vectors = places.shape[:2]
        looked = whole.new_zeros(*ids.shape, images * vectors)
        is_image = ids == self.token
        for row in range(len(ids)):
            looked[row][:, seen[row][is_image[row]]] = whole[row][:, is_image[row]]
        looked = looked / looked.sum(dim=-1, keepdim=True).clamp_min(1e-12)
        looked = rearrange(looked, "b t (n l) -> b t n l", l=vectors)
        return torch.einsum("btnl,nlp->btnp", looked, places)


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """Within this `with` the LM attends in the one way that tells its weights."""
    language_model = model.language_model
    before = language_model.config._attn_implementation
    language_model.set_attn_implementation("eager")
    try:
        yield
    finally:
        language_model.set_attn_implementation(before)

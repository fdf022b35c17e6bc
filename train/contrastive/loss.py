"""open_clip's losses, with the same caption of several pictures as what it is: right for all of them.

Both losses take it that picture i belongs to text i and to no other. In data with few captions a
batch holds the same words again and again: a caption would be pushed away from pictures that it
describes, and with the sigmoid a picture from its own words. The targets come from a method of
open_clip's losses, which is all that is replaced here: the softmax's are shared among equal
captions, the sigmoid's are 1 for all of them.

b pairs of this rank, B = world x b pairs of all ranks, D width of a vector.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from einops import repeat
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor, nn


class _Clip(ClipLoss):
    """Each rank computes its own rows of the logits against the features of all; their gradients go back
    to where the features come from, so that the mean over ranks is the loss of the whole batch."""

    same: Tensor

    def __init__(self, rank: int, world: int):
        super().__init__(local_loss=world > 1, gather_with_grad=True, rank=rank, world_size=world)

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """float[b, B]: probabilities, which cross-entropy takes as well as numbers of classes."""
        return self.same / self.same.sum(1, keepdim=True)


class _SigLip(SigLipLoss):
    """Blocks of b x b logits, one per rank: open_clip asks for the targets of this rank's own first, then
    for those of every rank in order, its own again (which it leaves out)."""

    blocks: Iterator[Tensor]

    def __init__(self, rank: int, world: int):
        super().__init__(rank=rank, world_size=world, dist_impl="gather")

    def prepare(self, same: Tensor) -> None:
        blocks = same.chunk(self.world_size, dim=1)
        self.blocks = iter([blocks[self.rank], *blocks])

    def get_ground_truth(
        self, device: torch.device, dtype: torch.dtype, num_logits: int, negative_only: bool = False
    ) -> Tensor:
        """float[b, b]: 1 for what belongs together, -1 for the rest."""
        return 2 * next(self.blocks).to(dtype) - 1


class Contrastive(nn.Module):
    """What open_clip's model gives, and who says the same -> the loss of this rank's rows.

    kind: "clip" or "siglip"; equal_captions: "match" or "differ", see the recipe. The mean of the
    losses over ranks is the loss of the whole batch, and so are the gradients' means.
    """

    def __init__(self, kind: str, equal_captions: str, rank: int = 0, world: int = 1):
        super().__init__()
        self.match, self.rank, self.world = equal_captions == "match", rank, world
        self.inner: _Clip | _SigLip = _Clip(rank, world) if kind == "clip" else _SigLip(rank, world)

    def forward(self, features: dict[str, Tensor], captions: Tensor) -> Tensor:
        """features: of length 1, float[b, D]; captions: int64[b], equal numbers for equal texts."""
        same = self.same(captions) if self.match else self._own(captions)
        if isinstance(self.inner, _Clip):
            self.inner.same = same.float()
        else:
            self.inner.prepare(same)
        told: dict[str, Any] = {"logit_bias": features.get("logit_bias")}
        images, texts = (features[f"{part}_features"].float() for part in ("image", "text"))
        return self.inner(images, texts, features["logit_scale"].float(), **told)

    def same(self, captions: Tensor) -> Tensor:
        """bool[b, B]: which of all captions are the same text as that of a picture of this rank."""
        return captions[:, None] == self._all(captions)[None]

    def _own(self, captions: Tensor) -> Tensor:
        first = self.rank * len(captions)
        numbers = torch.arange(self.world * len(captions), device=captions.device)
        return repeat(numbers, "B -> b B", b=len(captions)) == numbers[first : first + len(captions), None]

    @torch.no_grad()
    def right(self, features: dict[str, Tensor], captions: Tensor) -> Tensor:
        """How many of this rank's pictures have the right text as the nearest of the batch."""
        nearest = (
            features["image_features"].float() @ self._all(features["text_features"].float()).T
        ).argmax(1)
        return self.same(captions).gather(1, nearest[:, None]).sum()

    def _all(self, values: Tensor) -> Tensor:
        """Of all ranks, in their order, without a gradient."""
        if self.world == 1:
            return values.detach()
        parts = [torch.empty_like(values) for _ in range(self.world)]
        dist.all_gather(parts, values.detach().contiguous())
        return torch.cat(parts)

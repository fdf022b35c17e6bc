"""One objective over many sources (DESIGN decision 8).

loss = sum over sources of weight x (summed NLL of the source / its target tokens over all
ranks and micro-batches): the step does not depend on how its batch was split.
B rows, T tokens, N images, G grid positions, E encoder width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flamingo.data.batch import Batch
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.train.features import FeatureCache


class Objective(nn.Module):
    """What the engine wraps: `forward` gives this micro-batch's share of the step's loss."""

    def __init__(
        self,
        model: FlamingoForConditionalGeneration,
        weights: Mapping[str, float],
        cache: FeatureCache,
        autocast: torch.dtype,
    ):
        super().__init__()
        self.model, self.weights, self.cache, self.autocast = model, dict(weights), cache, autocast
        self.register_state_dict_post_hook(_trained_only)

    def forward(
        self, batches: Mapping[str, Batch], targets: Mapping[str, int], blank: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """batches: one micro-batch of each source; targets: tokens of each source in the step.

        blank: the images replaced by blank ones (zeros: the mean colour).
        Returns the loss float[] and, per source, the summed NLL float64[] without gradient.
        """
        loss = torch.zeros((), device=self.model.device)
        sums: dict[str, Tensor] = {}
        for name, batch in batches.items():
            nll = self._nll(batch, blank)
            sums[name] = nll.detach().double()
            loss = loss + self.weights[name] * nll / max(1, targets[name])
        whole = all(batch.n_targets and batch.image_keys for batch in batches.values())
        if torch.is_grad_enabled() and not (batches and whole):
            # A rank without images or targets still takes part in every reduction.
            loss = loss + 0.0 * sum(p.sum() for p in self.parameters() if p.requires_grad)
        return loss, sums

    def _nll(self, batch: Batch, blank: bool) -> Tensor:
        """Summed NLL of one micro-batch: float32[]."""
        device = self.model.device
        if batch.n_targets == 0:
            return torch.zeros((), device=device)
        images = len(batch.image_keys)
        grids = self.cache.blank(images) if blank else self.cache.grids(batch)
        with torch.autocast(device.type, self.autocast, enabled=self.autocast != torch.float32):
            out = self.model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                media=self.model.media(grids=grids) if images else None,
                labels=batch.labels,
                reduction="sum",
            )
        return out.loss


def _trained_only(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict) -> None:
    """A checkpoint holds what is trained: tied weights and buffers of the frozen part go too."""
    trained = {prefix + name for name, p in module.named_parameters() if p.requires_grad}
    for name in [name for name in state if name not in trained]:
        del state[name]

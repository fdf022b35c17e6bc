"""One objective over many sources (DESIGN decision 8).

loss = sum over sources of weight x (summed NLL of the source / its target tokens over all
ranks and micro-batches): the step does not depend on how its batch was split.
M targets: tokens with loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from flamingo.data.packing import Rows
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
        self, passes: Sequence[Rows], targets: Mapping[str, int], blank: bool = False
    ) -> tuple[Tensor, Tensor]:
        """passes: rows of one micro-batch, whose `source` counts the sources in the order of
        `weights`; targets: tokens of each source in the step.

        blank: the images replaced by blank ones (zeros: the mean colour).
        Returns the loss float[] and the summed NLL of each source, float64[sources] without graph.
        """
        shares = [weight / max(1, targets[name]) for name, weight in self.weights.items()]
        share = torch.tensor(shares, device=self.model.device)
        loss = torch.zeros((), device=self.model.device)
        sums = torch.zeros(len(shares), dtype=torch.float64, device=self.model.device)
        whole = bool(passes)
        for rows in passes:
            source = rows.target_source
            whole &= bool(len(source) and rows.image_keys)
            if not len(source):
                continue
            nll = self._nll(rows, blank)
            sums.index_add_(0, source, nll.detach().double())
            loss = loss + (nll * share[source]).sum()
        if torch.is_grad_enabled() and not whole:
            # A rank without images or targets still takes part in every reduction.
            loss = loss + 0.0 * sum(p.sum() for p in self.parameters() if p.requires_grad)
        return loss, sums

    def _nll(self, rows: Rows, blank: bool) -> Tensor:
        """NLL of each target, row by row: float32[M]."""
        device, images = self.model.device, len(rows.image_keys)
        grids = self.cache.blank(images) if blank else self.cache.grids(rows)
        with torch.autocast(device.type, self.autocast, enabled=self.autocast != torch.float32):
            out = self.model(
                input_ids=rows.input_ids,
                attention_mask=rows.attention_mask,
                segment_ids=rows.segment_ids,
                look_ahead=rows.look_ahead,
                media=self.model.media(grids=_by_clip(grids, rows.frames), frames=rows.frames)
                if images
                else None,
                labels=rows.labels,
                reduction="none",
            )
        return out.loss


def _by_clip(grids: Tensor, frames: Tensor | None) -> Tensor:
    """float[N, G, E] of all pictures -> float[K, F, G, E], F of the longest clip; int64[K] says how
    many are a clip's own. Without clips the grids stay as they are."""
    if frames is None:
        return grids
    longest = int(frames.max())
    mine = torch.arange(longest, device=frames.device) < frames[:, None]  # [K, F]
    clips = grids.new_zeros(*mine.shape, *grids.shape[1:])
    clips[mine] = grids
    return clips


def _trained_only(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict) -> None:
    """A checkpoint holds what is trained: tied weights and buffers of the frozen part go too."""
    trained = {prefix + name for name, p in module.named_parameters() if p.requires_grad}
    for name in [name for name in state if name not in trained]:
        del state[name]

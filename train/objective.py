"""One objective over many sources (DESIGN decision 8).

loss = sum over sources of weight x (summed NLL of the source / its target tokens over all
ranks and micro-batches): the step does not depend on how its batch was split.
M targets: tokens with loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from flamingo.data.packing import Rows, with_image
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.train.features import FeatureCache
from flamingo.train.remade import remade_activations


class Objective(nn.Module):
    """What the engine wraps: `forward` gives this micro-batch's share of the step's loss."""

    def __init__(
        self,
        model: FlamingoForConditionalGeneration,
        weights: Mapping[str, float],
        cache: FeatureCache,
        autocast: torch.dtype,
        z_loss: float = 0.0,
    ):
        """z_loss: weight of the mean squared log of the softmax's sum, beside each source's loss
        (as Laurencon et al. 2023 train IDEFICS; it keeps logits from drifting)."""
        super().__init__()
        self.model, self.weights, self.cache, self.autocast = model, dict(weights), cache, autocast
        self.z_loss = z_loss

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
        for rows in passes:  # also without a target: the other ranks run the same modules
            source = rows.target_source
            nll, log_sums = self._nll(rows, blank)
            sums.index_add_(0, source, nll.detach().double())
            if self.z_loss:
                assert log_sums is not None
                nll = nll + self.z_loss * log_sums.square()
            loss = loss + (nll * share[source]).sum()
        if torch.is_grad_enabled():
            # What no row of this rank uses still takes part in every reduction.
            loss = loss + 0.0 * sum(p.sum() for p in self._unsure(bool(passes)))
        return loss, sums

    def _unsure(self, passed: bool) -> list[nn.Parameter]:
        """Trained parameters that a rank need not have used: of the LM and the encoder, or all where
        it had no rows. In the connecting parts each pass has an image and goes through all."""
        model = self.model
        always = () if not passed else (model.resampler, model.gated_blocks, model.added_tokens)
        sure = {id(p) for part in always for p in part.parameters()}
        wanted = (p for p in self.parameters() if p.requires_grad and not hasattr(p, "ds_id"))
        return [p for p in wanted if id(p) not in sure]

    def _nll(self, rows: Rows, blank: bool) -> tuple[Tensor, Tensor | None]:
        """float32[M] NLL of each target, row by row; and for z-loss float32[M], log-sum-exp of its logits."""
        device = self.model.device
        if not rows.image_keys:
            # Under ZeRO-3 all ranks must run the same modules: a picture that no target sees.
            rows, grids = with_image(rows, self.model.config.image_token_id), self.cache.blank(1)
        else:
            grids = self.cache.blank(len(rows.image_keys)) if blank else self.cache.grids(rows)
        arithmetic = torch.autocast(device.type, self.autocast, enabled=self.autocast != torch.float32)
        with arithmetic, remade_activations():
            out = self.model(
                input_ids=rows.input_ids,
                attention_mask=rows.attention_mask,
                segment_ids=rows.segment_ids,
                look_ahead=rows.look_ahead,
                media=self.model.media(grids=_by_clip(grids, rows.frames), frames=rows.frames),
                labels=rows.labels,
                reduction="none",
                skip_logits=True,
            )
        if self.z_loss and out.logits is not None:
            return out.loss, out.logits[0].float().logsumexp(dim=-1)
        return out.loss, out.log_sums


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

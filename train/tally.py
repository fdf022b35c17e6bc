"""What a step is made of, over its sources, micro-batches and ranks: rows, targets, losses, sizes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flamingo.data.packing import Rows, packed, padded
from flamingo.data.steps import StepBatches
from flamingo.train import gauges
from flamingo.train.config import Recipe
from flamingo.train.engine import Engine, sum_over_ranks
from flamingo.train.flops import step_flops
from flamingo.train.objective import Objective


class Tally:
    """Every method but `rows`, `moved` and `held` is called by all ranks together."""

    def __init__(self, recipe: Recipe, engine: Engine, pack_tokens: int):
        self.names = [source.name for source in recipe.sources]
        self.accumulation, self.device, self.pack_tokens = recipe.accumulation, engine.device, pack_tokens
        self.objective: Objective = engine.module  # type: ignore[assignment]
        self.model = self.objective.model
        # Its id, and how many the LM reads.
        self._image = self.model.config.image_token_id, self.model.image_tokens

    def rows(self, batches: StepBatches, number: int) -> list[Rows]:
        """Micro-batch `number` of all sources as rows."""
        micro = [batches[name][number] if name in batches else None for name in self.names]
        if self.pack_tokens:
            return packed(micro, self.pack_tokens, *self._image)
        return padded(micro)

    def moved(self, rows: list[Rows]) -> list[Rows]:
        """On this rank's device."""
        return [part.to(self.device, non_blocking=True) for part in rows]

    def held(self, rows: list[Rows]) -> gauges.Held:
        """What the rows hold."""
        return gauges.held(rows, *self._image)

    def targets(self, batches: StepBatches) -> dict[str, int]:
        """Target tokens of each source over all ranks and micro-batches of the step."""
        local = [sum(batch.n_targets for batch in batches.get(name, [])) for name in self.names]
        counts = sum_over_ranks(torch.tensor(local, dtype=torch.int64, device=self.device))
        return dict(zip(self.names, counts.tolist(), strict=True))

    def means(self, sums: Tensor, targets: dict[str, int]) -> dict[str, float]:
        """Mean NLL of the sources that had target tokens in this step. sums: of this rank."""
        total = sum_over_ranks(sums.to(self.device)).tolist()
        each = zip(self.names, total, strict=True)
        return {name: round(nll / targets[name], 6) for name, nll in each if targets[name]}

    @torch.no_grad()
    def blank_loss(self, batches: StepBatches) -> dict[str, float]:
        """The step's loss with its images replaced by blanks: equal means it does not look."""
        targets, sums = self.targets(batches), torch.zeros(len(self.names), dtype=torch.float64)
        for number in range(self.accumulation):
            _, parts = self.objective(self.moved(self.rows(batches, number)), targets, blank=True)
            sums += parts.cpu()
        return self.means(sums, targets)

    def sizes(self, batches: StepBatches, read: gauges.Held, targets: int) -> dict[str, Any]:
        """What the step held, over all ranks, and what it cost."""
        every = [batch for part in batches.values() for batch in part]
        counts = {
            "samples": sum(len(batch.keys) for batch in every),
            "tokens": sum(int(batch.attention_mask.sum()) for batch in every),
            "read_tokens": read.read_tokens,
            "images": sum(len(batch.image_keys) for batch in every),
            "marks": sum(int((batch.input_ids == self._image[0]).sum()) for batch in every),
            "skipped": sum(len(batch.skipped) for batch in every),
            "row_places": read.row_places,
            "pictures": sum(len(batch.pixel_values) for batch in every),
            "pairs": read.pairs,
            "held": read.tokens,
        }
        total = sum_over_ranks(torch.tensor(list(counts.values()), device=self.device)).tolist()
        sizes: dict[str, Any] = dict(zip(counts, total, strict=True))
        sizes["flops"] = step_flops(
            self.model,
            tokens=sizes.pop("held"),
            targets=targets,
            images=sizes.pop("marks"),
            places=sizes["images"] * math.prod(self.model.config.vision_config.grid),  # type: ignore[union-attr]
            pairs=sizes.pop("pairs"),
            pictures=sizes.pop("pictures"),
        )
        return {**sizes, "targets": targets}

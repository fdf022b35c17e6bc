"""The training loop: count targets -> forward -> backward -> clip once -> step -> report."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from flamingo.data.draws import draw
from flamingo.data.errors import Skipped
from flamingo.data.packing import Rows, packed, padded
from flamingo.data.steps import StepBatches, StepDataset, step_loader
from flamingo.train.checkpoint import Checkpoints
from flamingo.train.config import Recipe
from flamingo.train.engine import Engine, sum_over_ranks
from flamingo.train.faults import Faults
from flamingo.train.metrics import Metrics, gates
from flamingo.train.nonfinite import NonFinite
from flamingo.train.objective import Objective
from flamingo.train.optim import learning_rate


class Trainer:
    """Owns the number of consumed steps, which is all the state that the data has."""

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        dataset: StepDataset,
        metrics: Metrics,
        faults: Faults,
        nonfinite: NonFinite,
        checkpoints: Checkpoints,
        pack_tokens: int,
    ):
        self.recipe, self.engine, self.dataset, self.metrics = recipe, engine, dataset, metrics
        self.faults, self.nonfinite, self.checkpoints = faults, nonfinite, checkpoints
        self.objective: Objective = engine.module  # type: ignore[assignment]
        self.names = [source.name for source in recipe.sources]
        self.pack_tokens = pack_tokens

    def run(self, start: int, stop: int) -> None:
        """Train from step `start` (steps already done) to `stop`, and leave a checkpoint there."""
        recipe, last, saved = self.recipe, self.recipe.steps, start
        began = time.monotonic()
        for step, batches in enumerate(step_loader(self.dataset, start, stop, recipe.workers), start):
            waited = time.monotonic() - began
            record = self.train_step(step, batches)
            record["seconds"] = round(time.monotonic() - began, 4)  # with the wait for the data
            record["data_seconds"] = round(waited, 4)
            if record["skipped"]:  # on any rank
                record["faults"] = self.faults.note(step + 1, self._skipped(batches))
            if recipe.blank_every and (step % recipe.blank_every == 0 or step + 1 == last):
                record["loss_blank"] = self.blank_loss(batches)
            if (step + 1) % recipe.log_every == 0 or step + 1 == last:
                self.metrics.write(self._rates(record))
            if recipe.checkpoint_every and (step + 1) % recipe.checkpoint_every == 0:
                self.checkpoints.save(self.engine, step + 1)
                saved = step + 1
            began = time.monotonic()
        if saved < stop:
            self.checkpoints.save(self.engine, stop)
        self.checkpoints.finish()

    def train_step(self, step: int, batches: StepBatches) -> dict[str, Any]:
        """One optimizer step over all sources, micro-batches and ranks; its record."""
        recipe, engine = self.recipe, self.engine
        # What is drawn in a step (dropout) follows from it, so a resumed run draws the same.
        torch.manual_seed(draw(recipe.seed, "step", step, self.dataset.rank) >> 1)
        targets = self.count_targets(batches)
        rate = learning_rate(step, recipe.steps, recipe.optimizer)
        sums = torch.zeros(len(self.names), dtype=torch.float64)
        for number in range(recipe.accumulation):
            loss, parts = engine(self.rows(batches, number), targets)
            engine.backward(loss)
            sums += parts.cpu()
            if number + 1 < recipe.accumulation:
                engine.next_part()
        losses = self._mean(sums, targets)
        norms = engine.group_norms()
        norm = engine.update(rate)
        local = dict(zip(self.names, sums.tolist(), strict=True))
        skipped = self.nonfinite.note(step + 1, losses, norm, local, batches, engine.scale)
        engine.scale.update(not skipped)
        return {
            "step": step + 1,
            "loss": {name: loss for name, loss in losses.items() if math.isfinite(loss)},
            "lr": rate,
            "grad_norm": round(norm, 6) if math.isfinite(norm) else None,
            "grad_norms": {n: round(value, 6) for n, value in norms.items() if math.isfinite(value)},
            **({"step_skipped": 1} if skipped else {}),
            **gates(self.objective.model.gated_blocks),
            **self._sizes(batches),
        }

    def rows(self, batches: StepBatches, number: int) -> list[Rows]:
        """Micro-batch `number` of all sources as rows on this rank's device."""
        micro = [batches[name][number] if name in batches else None for name in self.names]
        if self.pack_tokens:
            passes = packed(micro, self.pack_tokens, self.objective.model.config.image_token_id)
        else:
            passes = padded(micro)
        return [rows.to(self.engine.device, non_blocking=True) for rows in passes]

    def count_targets(self, batches: StepBatches) -> dict[str, int]:
        """Target tokens of each source over all ranks and micro-batches of the step."""
        local = [sum(batch.n_targets for batch in batches.get(name, [])) for name in self.names]
        counts = sum_over_ranks(torch.tensor(local, dtype=torch.int64, device=self.engine.device))
        return dict(zip(self.names, counts.tolist(), strict=True))

    @torch.no_grad()
    def blank_loss(self, batches: StepBatches) -> dict[str, float]:
        """The step's loss with its images replaced by blanks: equal means it does not look."""
        targets, sums = self.count_targets(batches), torch.zeros(len(self.names), dtype=torch.float64)
        for number in range(self.recipe.accumulation):
            _, parts = self.objective(self.rows(batches, number), targets, blank=True)
            sums += parts.cpu()
        return self._mean(sums, targets)

    def _mean(self, sums: Tensor, targets: dict[str, int]) -> dict[str, float]:
        """Mean NLL of the sources that had target tokens in this step."""
        total = sum_over_ranks(sums.to(self.engine.device)).tolist()
        each = zip(self.names, total, strict=True)
        return {name: round(nll / targets[name], 6) for name, nll in each if targets[name]}

    @staticmethod
    def _skipped(batches: StepBatches) -> list[Skipped]:
        return [bad for part in batches.values() for batch in part for bad in batch.skipped]

    def _sizes(self, batches: StepBatches) -> dict[str, int]:
        every = [batch for part in batches.values() for batch in part]
        local = [
            sum(len(batch.keys) for batch in every),
            sum(int(batch.attention_mask.sum()) for batch in every),
            sum(len(batch.image_keys) for batch in every),
            sum(len(batch.skipped) for batch in every),
        ]
        total = sum_over_ranks(torch.tensor(local, device=self.engine.device)).tolist()
        return dict(zip(("samples", "tokens", "images", "skipped"), total, strict=True))

    @staticmethod
    def _rates(record: dict[str, Any]) -> dict[str, Any]:
        for name in ("samples", "tokens", "images"):
            record[f"{name}_per_second"] = round(record[name] / record["seconds"], 3)
        return record

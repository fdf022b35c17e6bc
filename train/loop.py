"""The training loop: count targets -> forward -> backward -> clip once -> step -> report."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from flamingo.data.errors import Skipped
from flamingo.data.packing import Rows, packed, padded
from flamingo.data.steps import StepBatches, StepDataset, step_loader
from flamingo.train import checkpoint
from flamingo.train.config import Recipe
from flamingo.train.engine import clip_and_step, sum_over_ranks
from flamingo.train.faults import Faults
from flamingo.train.metrics import Metrics, gates
from flamingo.train.objective import Objective
from flamingo.train.optim import learning_rate


class Trainer:
    """Owns the number of consumed steps, which is all the state that the data has."""

    def __init__(
        self, recipe: Recipe, engine: Any, dataset: StepDataset, metrics: Metrics, world: int, faults: Faults
    ):
        self.recipe, self.engine, self.dataset, self.metrics, self.world = (
            recipe,
            engine,
            dataset,
            metrics,
            world,
        )
        self.faults = faults
        self.objective: Objective = engine.module
        self.names = [source.name for source in recipe.sources]
        self.pack_tokens = recipe.pack_tokens
        if self.pack_tokens and not self.objective.model.packs():
            self.pack_tokens = 0
            metrics.say("this language model mixes documents that share a row: one document a row")

    def run(self, start: int) -> None:
        """Train from step `start` (steps already done) to the recipe's last."""
        recipe, last = self.recipe, self.recipe.steps
        folder, saved = recipe.run / "checkpoints", start
        began = time.monotonic()
        for step, batches in enumerate(step_loader(self.dataset, start, last, recipe.workers), start):
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
                checkpoint.save(self.engine, folder, step + 1, recipe.identity())
                saved = step + 1
            began = time.monotonic()
        if saved < last:
            checkpoint.save(self.engine, folder, last, recipe.identity())

    def train_step(self, step: int, batches: StepBatches) -> dict[str, Any]:
        """One optimizer step over all sources, micro-batches and ranks; its record."""
        targets = self.count_targets(batches)
        rate = learning_rate(step, self.recipe.steps, self.recipe.optimizer)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        sums = torch.zeros(len(self.names), dtype=torch.float64)
        for number in range(self.recipe.accumulation):
            loss, parts = self.engine(self.rows(batches, number), targets)
            # DeepSpeed averages over ranks; the objective already counts tokens of all ranks.
            self.engine.backward(loss * self.world, scale_wrt_gas=False)
            sums += parts.cpu()
            if number + 1 < self.recipe.accumulation:
                self.engine.step()
        losses = self._mean(sums, targets)
        self._check_finite(step, losses, batches)
        return {
            "step": step + 1,
            "loss": losses,
            "lr": rate,
            "grad_norm": round(clip_and_step(self.engine, self.recipe), 6),
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

    def _check_finite(self, step: int, losses: dict[str, float], batches: StepBatches) -> None:
        """Decided on sums over all ranks, so all ranks stop together."""
        bad = [name for name, loss in losses.items() if not math.isfinite(loss)]
        if bad:
            keys = [key for name in bad for batch in batches[name] for key in batch.keys]
            raise ValueError(
                f"the loss of {', '.join(bad)} is not finite at step {step + 1}; weights are as after "
                f"step {step}. A lower optimizer.lr is the usual cure. Samples of this rank: {keys[:8]}"
            )

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

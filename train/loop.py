"""The training loop: count targets -> forward -> backward -> clip once -> step -> report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flamingo.data.draws import draw
from flamingo.data.errors import Skipped
from flamingo.data.packing import Rows, packed, padded
from flamingo.data.steps import StepBatches, StepDataset, step_loader
from flamingo.train.checkpoint import Checkpoints
from flamingo.train.config import Recipe
from flamingo.train.engine import Engine, most_over_ranks, sum_over_ranks
from flamingo.train.faults import Faults
from flamingo.train.flops import step_flops
from flamingo.train.gauges import Held, derived, gates, held, memory_gb
from flamingo.train.metrics import Metrics
from flamingo.train.nonfinite import NonFinite
from flamingo.train.objective import Objective
from flamingo.train.optim import learning_rate
from flamingo.train.profile import profiled
from flamingo.train.stopping import Stopped, Stopping, answer
from flamingo.train.watchdog import Watchdog

PATIENCE = 4.0  # times as long as usual: a first step, a checkpoint


@dataclass
class Company:
    """What goes beside the steps, for the whole of a run."""

    metrics: Metrics
    faults: Faults
    nonfinite: NonFinite
    checkpoints: Checkpoints
    stopping: Stopping
    watchdog: Watchdog
    peak: float  # FLOP/s of matrix products that all ranks reach together
    evaluate: Callable[[int], dict[str, float]] | None = None  # scores after so many steps; on all ranks


class Trainer:
    """Owns the number of consumed steps, which is all the state that the data has."""

    def __init__(
        self, recipe: Recipe, engine: Engine, dataset: StepDataset, company: Company, pack_tokens: int
    ):
        self.recipe, self.engine, self.dataset, self.company = recipe, engine, dataset, company
        self.objective: Objective = engine.module  # type: ignore[assignment]
        self.names = [source.name for source in recipe.sources]
        self.pack_tokens = pack_tokens
        model = self.objective.model
        self._image = model.config.image_token_id, model.image_tokens  # its id, and how many the LM reads

    def run(self, start: int, stop: int) -> None:
        """Train from step `start` (steps already done) to `stop`, and leave a checkpoint there.

        Raises Stopped, after a checkpoint, when the run is asked to stop before.
        """
        recipe, beat = self.recipe, self.company.watchdog.beat
        loader = step_loader(self.dataset, start, stop, recipe.workers)
        for step in range(start, stop):
            beat(step + 1, "waiting for data", PATIENCE)
            began = time.monotonic()
            batches = next(loader)
            waited = most_over_ranks(time.monotonic() - began)  # all wait for the slowest
            beat(step + 1, "training", PATIENCE if step == start else 1.0)
            blank = self._blanked(step, batches)
            began = time.monotonic()
            with profiled(recipe, step + 1, self.dataset.rank):
                record = self.train_step(step, batches)
                record["seconds"] = round(waited + time.monotonic() - began, 4)
            record["data_seconds"] = round(waited, 4)
            self._report(step, record | blank, batches)
            self.company.checkpoints.poll()
            due = recipe.checkpoint_every and (step + 1) % recipe.checkpoint_every == 0
            goes_on = step + 1 < recipe.steps
            reason = self.company.stopping.agreed(self.engine.device) if goes_on else None
            if due or reason or step + 1 == stop:
                beat(step + 1, "writing a checkpoint", PATIENCE)
                self.company.checkpoints.save(self.engine, step + 1)
            if reason:
                self._stop(step + 1, reason)
        self.company.checkpoints.finish()

    def _report(self, step: int, record: dict[str, Any], batches: StepBatches) -> None:
        """Whatever is told of a step once it is done."""
        recipe, last = self.recipe, step + 1 == self.recipe.steps
        if record["skipped"]:  # on any rank
            record["faults"] = self.company.faults.note(step + 1, self._skipped(batches))
        asked = self.company.evaluate and recipe.evaluate
        if asked and self.company.evaluate and ((step + 1) % asked.every == 0 or last):
            self.company.watchdog.beat(step + 1, "evaluating", PATIENCE)
            record["scores"] = scores = self.company.evaluate(step + 1)
            said = ", ".join(f"{name} {score:g}" for name, score in scores.items())
            self.company.metrics.say(f"evaluation after step {step + 1}: {said}")
        told = record["skipped"] or record.keys() & {"loss_blank", "scores", "step_skipped"}
        if (step + 1) % recipe.log_every == 0 or last or told:
            flops = record.pop("flops")
            record |= derived(record, flops=flops, peak=self.company.peak)
            record["memory_gb"] = memory_gb(self.engine.device)
            self.company.metrics.write(record)

    def _stop(self, step: int, reason: str) -> None:
        self.company.checkpoints.finish()
        if self.dataset.rank == 0:
            answer(self.recipe.run, step, reason)
        raise Stopped(f"stopped after step {step}, with a checkpoint: {reason}. --resume goes on")

    def train_step(self, step: int, batches: StepBatches) -> dict[str, Any]:
        """One optimizer step over all sources, micro-batches and ranks; its record."""
        recipe, engine = self.recipe, self.engine
        self._seed(step)
        targets = self.count_targets(batches)
        rate = learning_rate(step, recipe.steps, recipe.optimizer)
        sums, read = torch.zeros(len(self.names), dtype=torch.float64), Held()
        for number in range(recipe.accumulation):
            rows = self.rows(batches, number)
            read += held(rows, *self._image)
            loss, parts = engine(self._moved(rows), targets)
            engine.backward(loss)
            sums += parts.cpu()
            if number + 1 < recipe.accumulation:
                engine.next_part()
        losses = self._mean(sums, targets)
        norms = engine.group_norms()
        norm = engine.update(rate)
        local = dict(zip(self.names, sums.tolist(), strict=True))
        skipped = self.company.nonfinite.note(step + 1, losses, norm, local, batches, engine.scale)
        engine.scale.update(not skipped)
        return {
            "step": step + 1,
            "loss": {name: loss for name, loss in losses.items() if math.isfinite(loss)},
            "lr": rate,
            **({"lrs": engine.rates(rate)} if recipe.optimizer.lr_factors else {}),
            "grad_norm": round(norm, 6) if math.isfinite(norm) else None,
            "grad_norms": {n: round(value, 6) for n, value in norms.items() if math.isfinite(value)},
            **({"step_skipped": 1} if skipped else {}),
            **gates(self.objective.model.gated_blocks),
            **self._sizes(batches, read, sum(targets.values())),
        }

    def _seed(self, step: int) -> None:
        """What is drawn in a step (dropout) follows from it, so a resumed run draws the same."""
        torch.manual_seed(draw(self.recipe.seed, "step", step, self.dataset.rank) >> 1)

    def rows(self, batches: StepBatches, number: int) -> list[Rows]:
        """Micro-batch `number` of all sources as rows."""
        micro = [batches[name][number] if name in batches else None for name in self.names]
        if self.pack_tokens:
            return packed(micro, self.pack_tokens, *self._image)
        return padded(micro)

    def _moved(self, passes: list[Rows]) -> list[Rows]:
        """On this rank's device."""
        return [rows.to(self.engine.device, non_blocking=True) for rows in passes]

    def count_targets(self, batches: StepBatches) -> dict[str, int]:
        """Target tokens of each source over all ranks and micro-batches of the step."""
        local = [sum(batch.n_targets for batch in batches.get(name, [])) for name in self.names]
        counts = sum_over_ranks(torch.tensor(local, dtype=torch.int64, device=self.engine.device))
        return dict(zip(self.names, counts.tolist(), strict=True))

    def _blanked(self, step: int, batches: StepBatches) -> dict[str, Any]:
        """`loss_blank` of a step that is about to be taken, where it is due: of the weights and draws that
        its loss is of, which the step would change."""
        every = self.recipe.blank_every
        if not every or (step % every and step + 1 < self.recipe.steps):
            return {}
        self._seed(step)
        return {"loss_blank": self.blank_loss(batches)}

    @torch.no_grad()
    def blank_loss(self, batches: StepBatches) -> dict[str, float]:
        """The step's loss with its images replaced by blanks: equal means it does not look."""
        targets, sums = self.count_targets(batches), torch.zeros(len(self.names), dtype=torch.float64)
        for number in range(self.recipe.accumulation):
            rows = self._moved(self.rows(batches, number))
            _, parts = self.objective(rows, targets, blank=True)
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

    def _sizes(self, batches: StepBatches, read: Held, targets: int) -> dict[str, Any]:
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
        total = sum_over_ranks(torch.tensor(list(counts.values()), device=self.engine.device)).tolist()
        sizes: dict[str, Any] = dict(zip(counts, total, strict=True))
        model = self.objective.model
        sizes["flops"] = step_flops(
            model,
            tokens=sizes.pop("held"),
            targets=targets,
            images=sizes.pop("marks"),
            places=sizes["images"] * math.prod(model.config.vision_config.grid),  # type: ignore[union-attr]
            pairs=sizes.pop("pairs"),
            pictures=sizes.pop("pictures"),
        )
        return {**sizes, "targets": targets}

"""The training loop: count targets -> forward -> backward -> clip once -> step -> report."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from flamingo.data.draws import draw
from flamingo.data.steps import StepBatches, StepDataset, step_loader
from flamingo.train.company import FlamingoCompany
from flamingo.train.config import Recipe
from flamingo.train.engine import Engine, most_over_ranks
from flamingo.train.gauges import Held, gates
from flamingo.train.optim import learning_rate
from flamingo.train.profile import profiled
from flamingo.train.tally import Tally
from flamingo.train.watchdog import PATIENCE


class Trainer:
    """Owns the number of consumed steps, which is all the state that the data has."""

    def __init__(
        self, recipe: Recipe, engine: Engine, dataset: StepDataset, company: FlamingoCompany, pack_tokens: int
    ):
        self.recipe, self.engine, self.dataset, self.company = recipe, engine, dataset, company
        self.tally = Tally(recipe, engine, pack_tokens)

    def run(self, start: int, stop: int) -> None:
        """Train from step `start` (steps already done) to `stop`, and leave a checkpoint there.

        Raises Stopped, after a checkpoint, when the run is asked to stop before.
        """
        recipe, company, beat = self.recipe, self.company, self.company.watchdog.beat
        loader = step_loader(self.dataset, start, stop, recipe.workers)
        for step in range(start, stop):
            beat(step + 1, "waiting for data", PATIENCE)
            began = time.monotonic()
            batches = next(loader)
            waited = most_over_ranks(time.monotonic() - began)  # all wait for the slowest
            beat(step + 1, "training", PATIENCE if step == start else 1.0)
            blank = self._blank(step, batches)
            began = time.monotonic()
            with profiled(recipe, step + 1, self.dataset.rank):
                record = self.train_step(step, batches)
                record["seconds"] = round(waited + time.monotonic() - began, 4)
            record["data_seconds"] = round(waited, 4)
            company.report(recipe, record | blank, batches)
            company.keep(recipe, self.engine, step + 1, last=step + 1 == stop)
        company.checkpoints.finish()

    def train_step(self, step: int, batches: StepBatches) -> dict[str, Any]:
        """One optimizer step over all sources, micro-batches and ranks; its record."""
        recipe, engine, tally = self.recipe, self.engine, self.tally
        self._seed(step)
        targets = tally.targets(batches)
        rate = learning_rate(step, recipe.steps, recipe.optimizer)
        sums, read = torch.zeros(len(tally.names), dtype=torch.float64), Held()
        for number in range(recipe.accumulation):
            rows = tally.rows(batches, number)
            read += tally.held(rows)
            loss, parts = engine(tally.moved(rows), targets)
            engine.backward(loss)
            sums += parts.cpu()
            if number + 1 < recipe.accumulation:
                engine.next_part()
        losses = tally.means(sums, targets)
        norm, norms = engine.update(rate)
        local = dict(zip(tally.names, sums.tolist(), strict=True))
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
            **gates(tally.model.gated_blocks),
            **tally.sizes(batches, read, sum(targets.values())),
        }

    def _blank(self, step: int, batches: StepBatches) -> dict[str, Any]:
        """`loss_blank` of a step that is about to be taken, where it is due: of the weights and draws that
        its loss is of, which the step would change."""
        every = self.recipe.blank_every
        if not every or (step % every and step + 1 < self.recipe.steps):
            return {}
        self._seed(step)
        return {"loss_blank": self.tally.blank_loss(batches)}

    def _seed(self, step: int) -> None:
        """What is drawn in a step (dropout) follows from it, so a resumed run draws the same."""
        torch.manual_seed(draw(self.recipe.seed, "step", step, self.dataset.rank) >> 1)

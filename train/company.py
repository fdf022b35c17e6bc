"""What goes beside the steps of a run: who is told of a step, who keeps it, who ends the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from flamingo.data.steps import StepBatches
from flamingo.train import engine
from flamingo.train.checkpoint import Checkpoints, Trained
from flamingo.train.config import Recipe, RunConfig
from flamingo.train.faults import Faults
from flamingo.train.gauges import derived, memory_gb
from flamingo.train.metrics import Metrics
from flamingo.train.nonfinite import NonFinite
from flamingo.train.stopping import Stopped, Stopping, answer
from flamingo.train.watchdog import PATIENCE, Watchdog

if TYPE_CHECKING:
    from flamingo.train.opening import Opened


@dataclass
class Company:
    """Of any training. All ranks call each method, after the same step."""

    rank: int
    metrics: Metrics
    faults: Faults
    checkpoints: Checkpoints
    stopping: Stopping
    watchdog: Watchdog

    @classmethod
    def of(cls, recipe: RunConfig, at: Opened, metrics: Metrics, start: int, **own: Any) -> Self:
        """own: fields that this kind of training has besides. start: steps done."""
        kept, behind = recipe.checkpoint_keep, recipe.checkpoint_background
        checkpoints = Checkpoints(recipe.run / "checkpoints", recipe.identity(), kept, behind)
        faults = Faults(recipe.run, start, recipe.max_bad_samples, at.rank)
        return cls(at.rank, metrics, faults, checkpoints, at.stopping, at.watchdog, **own)

    def keep(self, recipe: RunConfig, held: Trained, done: int, last: bool) -> None:
        """A checkpoint after `done` steps, where one is due. last: of this part of the run.

        Raises Stopped, after a checkpoint, when the run is asked to stop.
        """
        self.checkpoints.poll()
        due = recipe.checkpoint_every and done % recipe.checkpoint_every == 0
        reason = self.stopping.agreed(engine.device()) if done < recipe.steps else None
        if due or reason or last:
            self.watchdog.beat(done, "writing a checkpoint", PATIENCE)
            self.checkpoints.save(held, done)
        if reason:
            self.checkpoints.finish()
            if self.rank == 0:
                answer(recipe.run, done, reason)
            raise Stopped(f"stopped after step {done}, with a checkpoint: {reason}. --resume goes on")


@dataclass
class FlamingoCompany(Company):
    """Of a Flamingo's training."""

    nonfinite: NonFinite
    peak: float  # FLOP/s of matrix products that all ranks reach together
    evaluate: Callable[[int], dict[str, float]] | None = None  # scores after so many steps; on all ranks

    def report(self, recipe: Recipe, record: dict[str, Any], batches: StepBatches) -> None:
        """Whatever is told of a step once it is done."""
        step, asked = int(record["step"]), recipe.evaluate
        last = step == recipe.steps
        if record["skipped"]:  # on any rank
            bad = [bad for part in batches.values() for batch in part for bad in batch.skipped]
            record["faults"] = self.faults.note(step, bad)
        if asked and self.evaluate and (step % asked.every == 0 or last):
            self.watchdog.beat(step, "evaluating", PATIENCE)
            record["scores"] = scores = self.evaluate(step)
            said = ", ".join(f"{name} {score:g}" for name, score in scores.items())
            self.metrics.say(f"evaluation after step {step}: {said}")
        told = record["skipped"] or record.keys() & {"loss_blank", "scores", "step_skipped"}
        if step % recipe.log_every == 0 or last or told:
            flops = record.pop("flops")
            record |= derived(record, flops=flops, peak=self.peak)
            record["memory_gb"] = memory_gb(engine.device())
            self.metrics.write(record)

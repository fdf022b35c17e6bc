"""The loop: features of both towers -> loss -> backward -> clip once -> step -> report."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flamingo.data.draws import draw
from flamingo.data.steps import step_loader
from flamingo.train.company import Company
from flamingo.train.contrastive.config import ContrastiveRecipe
from flamingo.train.contrastive.data import PairBatch, Pairs
from flamingo.train.contrastive.held_out import HeldOut
from flamingo.train.contrastive.loss import Contrastive
from flamingo.train.engine import sum_over_ranks
from flamingo.train.gauges import derived, memory_gb
from flamingo.train.group import SharedError
from flamingo.train.moments import Moments
from flamingo.train.optim import learning_rate
from flamingo.train.precision import LossScale
from flamingo.train.watchdog import PATIENCE

LARGEST_SCALE = math.log(100)  # of the logits: beyond it training became unstable (Radford et al. 2021, 2.5)


class _Moments(Moments):
    """Of the trained parameters alone: statistics of batches are in checkpoints too, and have none."""

    def read(self, name: str) -> dict[str, Tensor]:
        return super().read(name) if name in self.named else {}


@dataclass
class Held:
    """What a checkpoint holds: weights by name, the optimizer's state, and the scale of the loss."""

    named: Mapping[str, Tensor]
    moments: Moments
    scale: LossScale = field(default_factory=lambda: LossScale.of("float32"))


class Trained:
    """A model of open_clip with its optimizer, on this rank.

    Attributes:
        named: trained parameters; statistics: of batches (BatchNorm), the same on all ranks after a step.
    """

    def __init__(self, model: nn.Module, recipe: ContrastiveRecipe, device: torch.device, world: int):
        self.model: Any = model.to(device)
        self.recipe, self.device, self.world = recipe, device, world
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        kept = model.state_dict().keys()
        self.statistics = {name: b for name, b in model.named_buffers() if name in kept}
        self.wrapped: Any = model
        if world > 1:
            ids = [device.index] if device.type == "cuda" else None
            self.wrapped = DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)
        settings = recipe.optimizer
        self.optimizer = torch.optim.AdamW(
            groups(self.model, settings.weight_decay),
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            fused=True,
        )
        self.moments = _Moments(self, self.named, stage=0)

    def held(self) -> Held:
        return Held({**self.named, **self.statistics}, self.moments)

    def restore(self, saved: Any) -> None:
        """From a checkpoint. Raises ValueError for one of another model."""
        everything = self.held()
        saved.check(everything.named)
        saved.weights_into(everything.named)
        saved.moments_into(Held(self.named, self.moments))
        saved.close()

    def features(self, batch: PairBatch) -> dict[str, Tensor]:
        with self._arithmetic():
            return self.wrapped(batch.pixel_values, batch.input_ids)

    @torch.no_grad()
    def image_features(self, pixels: Tensor) -> Tensor:
        with self._arithmetic():
            return self.model.encode_image(pixels.to(self.device), normalize=True).float().cpu()

    @torch.no_grad()
    def text_features(self, ids: Tensor) -> Tensor:
        with self._arithmetic():
            return self.model.encode_text(ids.to(self.device), normalize=True).float().cpu()

    @torch.no_grad()
    def update(self, rate: float) -> None:
        """One step of the optimizer with the gradients as they are."""
        for part in self.optimizer.param_groups:
            part["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.logit_scale.clamp_(0, LARGEST_SCALE)
        if self.world > 1:
            for buffer in self.statistics.values():
                dist.broadcast(buffer, 0)

    def _arithmetic(self) -> torch.autocast:
        half = self.recipe.autocast == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=half)


def groups(model: Any, decay: float) -> list[dict[str, Any]]:
    """Trained parameters, those that decay apart: matrices and kernels that open_clip does not except."""
    spared = model.no_weight_decay()
    decays: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays[parameter.ndim > 1 and name not in spared].append(parameter)
    return [
        {"params": params, "weight_decay": decay if does else 0.0}
        for does, params in decays.items()
        if params
    ]


@dataclass
class EncoderCompany(Company):
    """What goes beside the steps."""

    held_out: HeldOut | None


class Trainer:
    """Owns the number of consumed steps, which is all the state that the data has."""

    def __init__(
        self,
        recipe: ContrastiveRecipe,
        trained: Trained,
        loss: Contrastive,
        pairs: Pairs,
        company: EncoderCompany,
    ):
        self.recipe, self.trained, self.loss, self.pairs, self.company = recipe, trained, loss, pairs, company
        self.scores: dict[str, float] = {}

    def run(self, start: int) -> None:
        """Train from step `start` (steps already done) to the end, and leave a checkpoint there.

        Raises Stopped, after a checkpoint, when the run is asked to stop before.
        """
        recipe, company, beat = self.recipe, self.company, self.company.watchdog.beat
        loader = step_loader(self.pairs, start, recipe.steps, recipe.workers)
        self._mode(training=True)
        for step in range(start, recipe.steps):
            beat(step + 1, "waiting for data", PATIENCE)
            began = time.monotonic()
            batch = next(loader)
            waited = time.monotonic() - began
            beat(step + 1, "training", PATIENCE if step == start else 1.0)
            record = self.train_step(step, batch)
            record["seconds"] = round(time.monotonic() - began, 4)  # with the wait for the data
            record["data_seconds"] = round(waited, 4)
            self._report(step + 1, record, batch)
            company.keep(recipe, self.trained.held(), step + 1, last=step + 1 == recipe.steps)
        company.checkpoints.finish()

    def train_step(self, step: int, batch: PairBatch) -> dict[str, Any]:
        """One optimizer step over all ranks; its record. Raises ValueError on what is not finite."""
        recipe, trained = self.recipe, self.trained
        # What is drawn in a step (dropped patches) follows from it, so a resumed run draws the same.
        torch.manual_seed(draw(recipe.seed, "step", step, self.pairs.rank) >> 1)
        rate = learning_rate(step, recipe.steps, recipe.optimizer)
        # Moved here: what was skipped stays.
        moved = {key: getattr(batch, key).to(trained.device, non_blocking=True) for key in batch._fields[:3]}
        batch = batch._replace(**moved)
        features = trained.features(batch)
        loss = self.loss(features, batch.captions)
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(trained.named.values(), recipe.optimizer.clip))
        right = self.loss.right(features, batch.captions)
        local = torch.stack([loss.detach().double() / trained.world, right.double()])
        mean, hits = sum_over_ranks(local).tolist()
        self._check(step, mean, norm)
        scale = float(features["logit_scale"].detach())
        trained.update(rate)
        return {
            "step": step + 1,
            "loss": {"contrastive": round(mean, 6)},
            "accuracy": round(hits / recipe.data.batch, 4),
            "logit_scale": round(scale, 4),
            "lr": rate,
            "grad_norm": round(norm, 6),
            "samples": recipe.data.batch,
            "skipped": int(sum_over_ranks(torch.tensor(len(batch.skipped), device=trained.device))),
        }

    def _check(self, step: int, loss: float, norm: float) -> None:
        """All ranks see the same numbers, so all stop together, with the weights of the step before."""
        told = {"loss": loss, "norm of the gradient": norm}
        bad = [f"the {what} is {value}" for what, value in told.items() if not math.isfinite(value)]
        if bad:
            raise SharedError(
                f"{bad[0]} at step {step + 1}: lower optimizer.lr={self.recipe.optimizer.lr:g}, lengthen "
                "optimizer.warmup_steps, or set autocast=float32, in a new folder (run=FOLDER)"
            )

    def _report(self, done: int, record: dict[str, Any], batch: PairBatch) -> None:
        """Whatever is told of a step once it is done."""
        recipe, company = self.recipe, self.company
        last = done == recipe.steps
        if record["skipped"]:  # on any rank
            record["faults"] = company.faults.note(done, batch.skipped)
        every = recipe.validation.every if recipe.validation else 0
        if company.held_out and (last or (every and done % every == 0)):
            company.watchdog.beat(done, "evaluating", PATIENCE)
            record["scores"] = self.evaluate(done)
        if done % recipe.log_every == 0 or last or "scores" in record:
            record |= derived(record)
            record["memory_gb"] = memory_gb(self.trained.device)
            company.metrics.write(record)

    def evaluate(self, done: int) -> dict[str, float]:
        """Held-out retrieval after so many steps; on all ranks."""
        assert self.company.held_out
        self._mode(training=False)
        trained = self.trained
        self.scores = told = self.company.held_out(trained.image_features, trained.text_features)
        self._mode(training=True)
        left_out = f", {told['left_out']} bad ones left out" if told["left_out"] else ""
        self.company.metrics.say(
            f"held-out after step {done}: image to text {told['image_to_text']:.3f}, text to image "
            f"{told['text_to_image']:.3f}, chance {told['chance']:.3f} ({told['pictures']} pictures, "
            f"{told['captions']} different captions{left_out})"
        )
        return told

    def _mode(self, training: bool) -> None:
        """A locked tower stays as it is used."""
        model, settings = self.trained.model, self.recipe.model
        self.trained.wrapped.train(training)
        if settings.lock_image:
            model.visual.eval()
        if settings.lock_text and hasattr(model, "text"):
            model.text.eval()

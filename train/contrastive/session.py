"""A whole training run of a dual encoder on this rank: open everything, train, export."""

from __future__ import annotations

import time

import torch

from flamingo.data.stream import Stream
from flamingo.train import engine, manifest
from flamingo.train.contrastive.config import ContrastiveRecipe
from flamingo.train.contrastive.data import Pairs
from flamingo.train.contrastive.encoder import DualEncoder, build, export, lock
from flamingo.train.contrastive.held_out import HeldOut
from flamingo.train.contrastive.loop import EncoderCompany, Trained, Trainer
from flamingo.train.contrastive.loss import Contrastive
from flamingo.train.metrics import Metrics
from flamingo.train.opening import alike, begin, newest, opened, together, write_summary
from flamingo.train.stopping import Stopping, forget
from flamingo.train.watchdog import PATIENCE


def train(
    recipe: ContrastiveRecipe,
    resume: bool = False,
    accept_changed_shards: bool = False,
    stopping: Stopping | None = None,
) -> None:
    """Train as the recipe says, on this rank of however many the launcher started.

    accept_changed_shards: go on with other shards than those that the run began with; stopping: who
    listens to signals. Raises Stopped when the run is asked to stop, with a checkpoint.
    """
    began = time.monotonic()
    with opened(recipe, resume, stopping) as at:
        rank, world = at.rank, at.world
        with alike():
            encoder = open_encoder(recipe)
            pairs = open_pairs(recipe, encoder, rank, world)
            held_out = HeldOut(recipe.validation, encoder, rank, world) if recipe.validation else None
        trained = Trained(encoder.model, recipe, engine.device(), world)
        saved = newest(recipe, rank)
        start = saved.step if saved else 0
        if saved:
            with alike():
                trained.restore(saved)
        locked = [(name, p) for name, p in encoder.model.named_parameters() if not p.requires_grad]
        towers = {"model.name": manifest.digest(locked)} if locked else {}
        together(rank, lambda: manifest.check_backbones(recipe.run, towers))
        shards = manifest.manifest([pairs.stream])
        together(rank, lambda: manifest.check(recipe.run, shards, accept_changed_shards))
        together(rank, lambda: begin(recipe, start))
        if rank == 0:
            forget(recipe.run)
        settings = recipe.model_dump(mode="json")
        metrics = Metrics(recipe.run, recipe.steps, start, rank == 0, recipe.trackers, settings)
        company = EncoderCompany.of(recipe, at, metrics, start, held_out=held_out)
        if saved:
            metrics.say(f"going on from {saved.path}")
        loss = Contrastive(recipe.loss, recipe.equal_captions, rank, world)
        trainer = Trainer(recipe, trained, loss, pairs, company)
        try:
            trainer.run(start)
        finally:
            metrics.close()
        at.watchdog.beat(recipe.steps, "writing the model", PATIENCE)
        if rank == 0:
            _finish(recipe, encoder, trainer, world, start, time.monotonic() - began)
        torch.distributed.barrier()


def open_encoder(recipe: ContrastiveRecipe) -> DualEncoder:
    """The model that the recipe begins with, the same on every rank."""
    torch.manual_seed(recipe.seed)
    encoder = build(recipe.model, recipe.loss)
    lock(encoder, recipe.model)
    if recipe.activation_checkpointing:
        encoder.model.set_grad_checkpointing(True)
    return encoder


def open_pairs(recipe: ContrastiveRecipe, encoder: DualEncoder, rank: int, world: int) -> Pairs:
    """The recipe's shards as this rank's part of every step."""
    transform = encoder.transform
    stream = Stream(recipe.data.source(), recipe.seed, image_side=transform.size)
    return Pairs(stream, transform, encoder.tokenizer, recipe.data.batch, rank, world)


def _finish(
    recipe: ContrastiveRecipe, encoder: DualEncoder, trainer: Trainer, world: int, start: int, seconds: float
) -> None:
    """The folder of the model, and `train.json`."""
    folder = recipe.run / "model"
    export(encoder, folder)
    trained = sum(p.numel() for p in trainer.trained.named.values())
    summary = {
        "steps": recipe.steps,
        "resumed_at": start,
        "ranks": world,
        "device": str(trainer.trained.device),
        "train_seconds": round(seconds, 1),
        "trained_parameters": trained,
        "frozen_parameters": sum(p.numel() for p in encoder.model.parameters()) - trained,
        "held_out": trainer.scores,
    }
    write_summary(recipe, summary)
    print(
        f"{folder}: open_clip loads it as local-dir:{folder}, a recipe takes it as open_clip:{folder}",
        flush=True,
    )

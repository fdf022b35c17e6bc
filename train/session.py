"""A whole training run on this rank: open everything, train, export.

What is unfrozen on the way begins a new phase: a checkpoint, and a new engine that goes on from it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flamingo.attention import attend_plainly
from flamingo.config import FlamingoConfig
from flamingo.data.features import FeatureShards
from flamingo.data.kinds import longest_clip
from flamingo.data.steps import StepDataset, open_feeds
from flamingo.features import fingerprint
from flamingo.fusions import positions
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.processing import FlamingoProcessor
from flamingo.runtime import dtype_of
from flamingo.train import engine, manifest
from flamingo.train.checkpoint import Saved
from flamingo.train.company import FlamingoCompany
from flamingo.train.config import Recipe
from flamingo.train.export import assemble, export_run
from flamingo.train.features import FeatureCache
from flamingo.train.flops import measured_peak
from flamingo.train.group import SharedError
from flamingo.train.loop import Trainer
from flamingo.train.metrics import Metrics
from flamingo.train.nonfinite import NonFinite
from flamingo.train.objective import Objective
from flamingo.train.opening import (
    Opened,
    alike,
    begin,
    newest,
    opened,
    settled,
    slow_arithmetic,
    together,
    write_summary,
)
from flamingo.train.optim import trained
from flamingo.train.parts import boundaries, compile_parts, new_at, unfreeze
from flamingo.train.precision import LossScale
from flamingo.train.stopping import Stopping, forget
from flamingo.train.watchdog import PATIENCE
from flamingo.written import check_place

# model, processor, folder of the run, rank, world size, steps done -> scores, on all ranks.
Evaluate = Callable[
    [FlamingoForConditionalGeneration, FlamingoProcessor, Path, int, int, int], dict[str, float]
]


def train(
    recipe: Recipe,
    resume: bool = False,
    accept_changed_shards: bool = False,
    stopping: Stopping | None = None,
    evaluate: Evaluate | None = None,
) -> None:
    """Train as the recipe says, on this rank of however many the launcher started.

    accept_changed_shards: go on with other shards than those that the run began with; stopping: who
    listens to signals; evaluate: does what the recipe's `evaluate` asks for. Raises Stopped when the
    run is asked to stop, with a checkpoint.
    """
    began = time.monotonic()
    with opened(recipe, resume, stopping) as at:
        _train(settled(recipe, at.rank), at, began, accept_changed_shards, evaluate)


def _train(recipe: Recipe, at: Opened, began: float, accept: bool, evaluate: Evaluate | None) -> None:
    rank, world = at.rank, at.world
    with alike():  # a file that one node lacks ends all ranks, not that node's alone
        if recipe.export:
            check_place(recipe.run / "model")  # before it is trained
        if recipe.deepspeed:
            engine.check_section(recipe, world)
        model, processor = _load(recipe, world)
        at.watchdog.beat(0, "opening the data", PATIENCE)
        cache = FeatureCache(model, recipe.feature_cache_gb, stored=_stored(recipe, model, processor))
        dataset = open_data(recipe, model, processor, cache, rank, world)
    weights = {source.name: source.weight for source in recipe.sources}
    objective = Objective(model, weights, cache, dtype_of(recipe.autocast), recipe.z_loss)
    saved = _found(recipe, rank, model, dataset, accept)
    start = saved.step if saved else 0
    metrics = Metrics(
        recipe.run, recipe.steps, start, rank == 0, recipe.trackers, recipe.model_dump(mode="json")
    )
    if saved:
        metrics.say(f"going on from {saved.path}")
    if (slow := slow_arithmetic(recipe)) is not None:
        metrics.say(slow)
    company = FlamingoCompany.of(
        recipe,
        at,
        metrics,
        start,
        nonfinite=NonFinite(recipe.run, recipe.max_skipped_steps, rank, metrics.say),
        peak=_peak(recipe),
        evaluate=partial(evaluate, model, processor, recipe.run, rank, world) if evaluate else None,
    )
    try:
        _phases(recipe, objective, dataset, company, world, saved)
        company.nonfinite.end(start)
    finally:
        metrics.close()
    seconds = time.monotonic() - began
    counts = _counts(model)
    del objective, cache, model, dataset, company
    gc.collect()  # the export makes the model anew: it need not be in memory twice

    at.watchdog.beat(recipe.steps, "writing the model", PATIENCE)

    def end() -> None:
        if recipe.export:
            export_run(recipe.run, recipe.run / "model")
        _summary(recipe, counts, world, start, seconds)

    together(rank, end)


def _found(
    recipe: Recipe, rank: int, model: FlamingoForConditionalGeneration, dataset: StepDataset, accept: bool
) -> Saved | None:
    """The checkpoint to go on from, once shards and backbones are seen to be those of the run."""
    backbones = {
        "model.vision": manifest.digest(model.vision_encoder.named_parameters()),  # type: ignore[union-attr]
        "model.language": manifest.digest(model.language_model.named_parameters()),
    }
    shards = manifest.manifest(feed.stream for feed in dataset.feeds)
    together(rank, lambda: manifest.check_backbones(recipe.run, backbones))
    together(rank, lambda: manifest.check(recipe.run, shards, accept))
    saved = newest(recipe, rank)
    together(rank, lambda: begin(recipe, saved.step if saved else 0))
    if rank == 0:
        forget(recipe.run)
    return saved


def _peak(recipe: Recipe) -> float:
    """FLOP/s of matrix products that all ranks reach together."""
    peak = torch.tensor(measured_peak(engine.device(), dtype_of(recipe.autocast)), dtype=torch.float64)
    return float(engine.sum_over_ranks(peak.to(engine.device())))


def _load(recipe: Recipe, world: int) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    torch.manual_seed(recipe.seed)
    model, processor = assemble(recipe, engine.gathered, engine.partitioned(recipe, world))
    model.to(engine.device())  # type: ignore[arg-type]
    attend_plainly(model.language_model)
    if recipe.activation_checkpointing:
        model.gradient_checkpointing_enable()
    return model, processor


def _stored(
    recipe: Recipe, model: FlamingoForConditionalGeneration, processor: FlamingoProcessor
) -> FeatureShards | None:
    """Grids on disk, if the recipe names any."""
    if not recipe.features:
        return None
    transform = processor.image_processor.transform  # type: ignore[attr-defined]
    encoder = fingerprint(model.vision_encoder, model.config.vision_config, transform)  # type: ignore[arg-type]
    return FeatureShards(recipe.features, encoder)


def _phases(
    recipe: Recipe,
    objective: Objective,
    dataset: StepDataset,
    company: FlamingoCompany,
    world: int,
    saved: Saved | None,
) -> None:
    """From the checkpoint to the end; what is unfrozen on the way begins another phase."""
    packs, model = recipe.pack_tokens, objective.model
    start = saved.step if saved else 0
    for stop in (stop for stop in boundaries(recipe) if stop > start):
        company.watchdog.beat(start, "making the engine", PATIENCE)
        wrapped = _phase(recipe, objective, world, saved)
        if packs and not model.packs():
            packs = 0
            company.metrics.say("this language model mixes documents that share a row: one document a row")
        try:
            Trainer(recipe, wrapped, dataset, company, packs).run(start, stop)
        finally:
            wrapped.close()
        start, saved = stop, newest(recipe, dataset.rank)
        if not saved or saved.step != stop:
            raise SharedError(
                f"the checkpoint of step {stop} was damaged right after it was written; is the disk sound? "
                "--resume goes on from the one before"
            )


def _phase(recipe: Recipe, objective: Objective, world: int, saved: Saved | None) -> engine.Engine:
    """An engine that trains what is due after `saved`, with its weights and optimizer state."""
    step = saved.step if saved else 0
    unfreeze(objective.model, recipe, step)
    objective.model.train()
    if saved:
        named = trained(objective)
        with alike():
            saved.check(named, new_at(objective.model, recipe, step))
        saved.weights_into(named)
    wrapped = engine.Engine(objective, recipe, world, LossScale.of(recipe.autocast))
    if saved:
        saved.moments_into(wrapped)
        saved.close()
    if recipe.compile:
        compile_parts(objective.model)
    return wrapped


def open_data(
    recipe: Recipe,
    model: FlamingoForConditionalGeneration,
    processor: FlamingoProcessor,
    cache: FeatureCache,
    rank: int,
    world: int,
) -> StepDataset:
    """The recipe's sources as this rank's micro-batches."""
    _check_clips(recipe, model.config.resampler_frames)
    _check_next_image(recipe, model.config)
    stored = cache.stored.__contains__ if cache.stored else None
    feeds = open_feeds(
        recipe.sources,
        seed=recipe.seed,
        tokenizer=processor.tokenizer,
        transform=processor.image_processor.transform,  # type: ignore[attr-defined]
        image_token_id=model.config.image_token_id,
        end_of_chunk_id=model.config.end_of_chunk_token_id,
        has_features=stored,
    )
    # Loader processes cannot see what the cache learns, so pixels are skipped only without them.
    skip = stored if recipe.workers else cache.has if cache.limit or stored else None
    return StepDataset(feeds, rank, world, recipe.accumulation, skip_pixels=skip)


def _check_clips(recipe: Recipe, trained: int | None) -> None:
    for source in recipe.sources:
        longest = longest_clip(source.kind, source.options)
        if longest > max(1, trained or 0):
            raise ValueError(
                f"source {source.name!r} has clips of up to {longest} frames, the resampler has "
                f"{trained or 'no'} embeddings for them: set model.architecture.resampler_frames={longest}, "
                "or fewer `frames` in the options of the source"
            )


def _check_next_image(recipe: Recipe, config: FlamingoConfig) -> None:
    for source in recipe.sources:
        if source.p_next and not positions(config):
            raise ValueError(
                f"source {source.name!r}: p_next={source.p_next:g}, but with fusion={config.fusion!r} words "
                "see the images before them and no later one: set p_next=0"
            )


def _counts(model: FlamingoForConditionalGeneration) -> dict[bool, int]:
    counts = {True: 0, False: 0}
    # Under ZeRO-3 the engine took the encoder out of the model's own modules.
    encoder: Any = model.vision_encoder
    for parameter in dict.fromkeys((*model.parameters(), *encoder.parameters())):
        counts[parameter.requires_grad] += getattr(parameter, "ds_numel", parameter.numel())
    return counts


def _summary(recipe: Recipe, counts: dict[bool, int], world: int, start: int, seconds: float) -> None:
    """What a report wants to know of the run."""
    summary = {
        "steps": recipe.steps,
        "resumed_at": start,
        "ranks": world,
        "device": str(engine.device()),
        "train_seconds": round(seconds, 1),
        "trained_parameters": counts[True],
        "frozen_parameters": counts[False],
    }
    write_summary(recipe, summary)

"""A whole training run on this rank: open everything, train, export."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import torch
import yaml

from flamingo.attention import attend_plainly
from flamingo.data.features import FeatureShards
from flamingo.data.kinds import longest_clip
from flamingo.data.steps import StepDataset, open_feeds
from flamingo.factory import create
from flamingo.features import fingerprint
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.processing import FlamingoProcessor
from flamingo.runtime import short_attention, tune_cpu
from flamingo.train import checkpoint, engine, manifest
from flamingo.train.config import Recipe
from flamingo.train.faults import Faults
from flamingo.train.features import FeatureCache
from flamingo.train.loop import Trainer
from flamingo.train.metrics import Metrics
from flamingo.train.objective import Objective

RECIPE = "recipe.yaml"


class SharedError(ValueError):
    """All ranks fail with the same words, so one of them says it."""


def begin(recipe: Recipe) -> None:
    """Make the run's folder, once all that can be wrong with a recipe has been seen."""
    held = recipe.run / RECIPE
    if not held.exists():
        recipe.run.mkdir(parents=True, exist_ok=True)
        held.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))


def check_folder(recipe: Recipe, resume: bool) -> None:
    """The run's folder must be new, or, to go on, of a run with the same settings.

    Raises ValueError when it holds another run, or a run that nobody asked to resume.
    """
    held = recipe.run / RECIPE
    if not held.exists():
        if (recipe.run / "checkpoints").exists() or (recipe.run / "metrics.jsonl").exists():
            raise ValueError(f"{recipe.run} holds files of a run but no {RECIPE}; choose run=FOLDER")
        return
    if not resume:
        raise ValueError(
            f"{recipe.run} holds a run already: --resume goes on with it, run=FOLDER starts another"
        )
    before = Recipe.model_validate(yaml.safe_load(held.read_text())).identity()
    changed = checkpoint.differences(before, recipe.identity())
    if changed:
        raise ValueError(
            f"{recipe.run} holds a run with other settings ({'; '.join(changed)}): "
            "set them back, or choose another folder with run=FOLDER"
        )


def train(recipe: Recipe, resume: bool = False, accept_changed_shards: bool = False) -> None:
    """Train as the recipe says, on this rank of however many the launcher started.

    accept_changed_shards: go on with other shards than those that the run began with.
    """
    began = time.monotonic()
    rank, world = engine.join_group()
    try:
        _together(rank, lambda: check_folder(recipe, resume))
        tune_cpu(processes=1 if torch.cuda.is_available() else world)
        with short_attention():
            _train(recipe, rank, world, began, accept_changed_shards)
    finally:
        engine.leave_group()


def _train(recipe: Recipe, rank: int, world: int, began: float, accept: bool) -> None:
    torch.manual_seed(recipe.seed)
    model, processor = create(
        vision=recipe.model.vision,
        language=recipe.model.language,
        vision_options=recipe.model.vision_options,
        frozen_dtype=getattr(torch, recipe.model.frozen_dtype),
        seed=recipe.seed,
        **recipe.model.architecture,
    )
    model.to(engine.device()).train()  # type: ignore[arg-type]
    attend_plainly(model.language_model)
    stored = None
    if recipe.features:
        encoder = fingerprint(model.vision_encoder, model.config.vision_config)  # type: ignore[arg-type]
        stored = FeatureShards(recipe.features, encoder)
    cache = FeatureCache(model, recipe.feature_cache_gb, stored=stored)
    dataset = open_data(recipe, model, processor, cache, rank, world)
    weights = {source.name: source.weight for source in recipe.sources}
    objective = Objective(model, weights, cache, getattr(torch, recipe.autocast))
    wrapped = engine.wrap(objective, recipe, world)
    found = checkpoint.newest(recipe.run / "checkpoints", recipe.identity())
    start = checkpoint.load(wrapped, found) if found else 0
    _together(rank, lambda: begin(recipe))
    _together(rank, lambda: manifest.check(recipe.run, manifest.manifest(dataset.feeds), accept))
    metrics = Metrics(recipe.run, recipe.steps, start, writes=rank == 0)
    if start:
        metrics.say(f"going on from {found}")
    try:
        faults = Faults(recipe.run, start, recipe.max_bad_samples, rank)
        Trainer(recipe, wrapped, dataset, metrics, world, faults).run(start)
    finally:
        metrics.close()
    if rank == 0:
        export(model, processor, recipe.run / "model")
        _summary(recipe, model, world, start, time.monotonic() - began)


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


@torch.no_grad()
def export(model: FlamingoForConditionalGeneration, processor: FlamingoProcessor, out: Path) -> None:
    """A folder for `from_pretrained`, in the dtype of the frozen part; complete or absent."""
    part = out.with_suffix(".part")
    dtype = next(model.language_model.parameters()).dtype
    model.to(dtype).save_pretrained(part)  # type: ignore[arg-type]
    processor.save_pretrained(part)
    old = out.with_suffix(".old")
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    part.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _summary(recipe: Recipe, model, world: int, start: int, seconds: float) -> None:
    """What a report wants to know of the run: `train.json`."""
    counts = {True: 0, False: 0}
    for parameter in model.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    summary = {
        "steps": recipe.steps,
        "resumed_at": start,
        "ranks": world,
        "device": str(engine.device()),
        "train_seconds": round(seconds, 1),
        "trained_parameters": counts[True],
        "frozen_parameters": counts[False],
    }
    (recipe.run / "train.json").write_text(json.dumps(summary, indent=1) + "\n")


def _together(rank: int, check) -> None:
    """Rank 0 checks; when it fails, all ranks fail with the same words."""
    words: list[str | None] = [None]
    if rank == 0:
        try:
            check()
        except (ValueError, OSError) as error:
            words = [str(error)]
    torch.distributed.broadcast_object_list(words, src=0)
    if words[0] is not None:
        raise SharedError(words[0])

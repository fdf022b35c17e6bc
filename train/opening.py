"""The frame of a training run, whatever it trains: its ranks, its folder, its newest checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from pydantic import ValidationError

from flamingo.data.writing import write_text
from flamingo.runtime import arithmetic, short_attention, tune_cpu
from flamingo.train import checkpoint, engine, group, trackers
from flamingo.train.checkpoint import Saved
from flamingo.train.config import RECIPE, Recipe, RunConfig
from flamingo.train.group import SharedError
from flamingo.train.lock import RunLock
from flamingo.train.stopping import Stopping
from flamingo.train.watchdog import PATIENCE, Watchdog

SUMMARY = "train.json"  # in the folder of a run
CHANGES = "changes.jsonl"  # beside it: settings with which it went on, where they are not the recipe's
LOCK_SECONDS = 60.0  # that a restarted run waits for the one before to end


class Opened(NamedTuple):
    """This rank of a run. stopping: who listens to signals; watchdog: watches from here on."""

    rank: int
    world: int
    stopping: Stopping
    watchdog: Watchdog


@contextmanager
def opened(recipe: RunConfig, resume: bool, stopping: Stopping | None = None) -> Iterator[Opened]:
    """Within this `with`, the ranks are met and the run's folder is theirs.

    Raises SharedError for a folder that is in use, or holds another run.
    """
    rank, world = engine.join_group(recipe.watchdog_seconds)
    lock = RunLock(recipe.run)
    try:
        # After a restart, a rank that was killed may still be ending.
        wait = LOCK_SECONDS if group.restarted(os.environ) else 0.0
        together(rank, lambda: lock.acquire(wait))
        together(rank, lambda: check_folder(recipe, resume))
        together(rank, lambda: trackers.check(recipe.trackers))
        tune_cpu(processes=1 if torch.cuda.is_available() else world)
        watchdog = Watchdog(recipe.run, rank, world, recipe.watchdog_seconds)
        with short_attention(), stopping or Stopping() as heard, watchdog:
            heard.limit(recipe.wall_minutes, recipe.run if rank == 0 else None)
            watchdog.beat(0, "loading", PATIENCE)
            yield Opened(rank, world, heard, watchdog)
    finally:
        if rank == 0:
            lock.release()
        engine.leave_group()


def together(rank: int, check: Callable[[], Any]) -> None:
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


@contextmanager
def alike() -> Iterator[None]:
    """Within this `with` every rank acts for itself; where any fails, all fail with its words."""
    failed = None
    try:
        yield
    except (ValueError, OSError) as error:
        failed = error
    words = [told for told in engine.gather_objects(str(failed) if failed else None) if told is not None]
    if words:
        raise SharedError(words[0]) from failed


def begin(recipe: RunConfig, step: int = 0) -> None:
    """Make the run's folder, once all that can be wrong with a recipe has been seen; of one that goes on
    after `step`, note the settings that are others from here on."""
    held, settings = recipe.run / RECIPE, recipe.model_dump(mode="json")
    if not held.exists():
        recipe.run.mkdir(parents=True, exist_ok=True)
        write_text(held, yaml.safe_dump(settings, sort_keys=False))
        return
    place = recipe.run / CHANGES
    lines = place.read_text().splitlines() if place.exists() else []
    before = type(recipe).model_validate(yaml.safe_load(held.read_text())).model_dump(mode="json")
    for number, line in enumerate(lines, 1):
        try:
            before |= json.loads(line)["settings"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{place}: line {number} is damaged; remove it to go on") from None
    changed = {key: value for key, value in settings.items() if key != "run" and before.get(key) != value}
    if changed:
        lines.append(json.dumps({"after_step": step, "settings": changed}))
        write_text(place, "\n".join(lines) + "\n")


def write_summary(recipe: RunConfig, summary: Mapping[str, Any]) -> None:
    """What there is to tell of a run at its end; one that had ended before keeps what it told then."""
    place = recipe.run / SUMMARY
    if summary["resumed_at"] < recipe.steps or not place.exists():
        write_text(place, json.dumps(summary, indent=1) + "\n")


def check_folder(recipe: RunConfig, resume: bool) -> None:
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
    try:
        before = type(recipe).model_validate(yaml.safe_load(held.read_text()))
    except yaml.YAMLError as error:
        raise ValueError(
            f"{held} is no YAML ({error}): put the recipe of this run there again, or choose run=FOLDER"
        ) from None
    except ValidationError:
        raise ValueError(
            f"{recipe.run} holds a run of another kind ({held} has other keys): choose run=FOLDER"
        ) from None
    changed = checkpoint.differences(before.identity(), recipe.like(before).identity())
    if changed:
        raise ValueError(
            f"{recipe.run} holds a run with other settings ({'; '.join(changed)}): "
            "set them back, or choose another folder with run=FOLDER"
        )


def settled(recipe: Recipe, rank: int) -> Recipe:
    """`auto` as the run has it that goes on; of a new one bfloat16, if the machines of all ranks have its
    products."""
    held = recipe.run / RECIPE
    before = held.read_text() if rank == 0 and held.exists() else None
    found = engine.gather_objects((before, arithmetic()))
    if found[0][0] is not None:
        return recipe.like(Recipe.model_validate(yaml.safe_load(found[0][0])))
    dtype = "float32" if any(has == "float32" for _, has in found) else "bfloat16"
    return recipe.settled(dtype, dtype)


def slow_arithmetic(recipe: Recipe) -> str | None:
    """What to tell whoever trains in bfloat16 where float32 is many times as fast."""
    if "bfloat16" not in (recipe.autocast, recipe.model.frozen_dtype) or arithmetic() == "bfloat16":
        return None
    return (
        "this processor has no products of bfloat16, and is many times as fast with autocast=float32 "
        "model.frozen_dtype=float32 (auto takes them by itself), in another folder"
    )


def newest(recipe: RunConfig, rank: int) -> Saved | None:
    """The newest undamaged checkpoint, which rank 0 looks for."""
    found: list[str | None] = [None]

    def look() -> None:
        path = checkpoint.newest(recipe.run / "checkpoints", recipe.identity())
        found[0] = str(path) if path else None

    together(rank, look)
    torch.distributed.broadcast_object_list(found, src=0)
    return Saved(Path(found[0])) if found[0] else None

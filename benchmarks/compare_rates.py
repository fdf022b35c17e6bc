"""Seconds of a training step of several ways, trained in turn: what `benchmarks.compare` says of speed.

A training of an hour meets other loads than the next one, and may have been stopped in between: its
own seconds say little. Here each way trains a few steps on small shards, whose grids are soon all
held, as they are for most of a whole training; then the next one does, and so on in rounds.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flamingo.quickstart import RECIPE, shards
from flamingo.train.config import Recipe, read_recipe

SAMPLES_PER_SHARD = 10  # documents and pictures of the one shard of a source
WARMUP = 6  # steps until all grids are held, and memory is no longer fresh

Command = Callable[..., None]  # words of `flamingo ...`


def measure(
    ways: Mapping[str, Sequence[str]], steps: int, rounds: int, command: Command
) -> dict[str, dict[str, Any]]:
    """Name -> {step_seconds, samples_per_second, rate_ratio, rate_ratio_range}.

    ways: overrides of the quickstart's recipe; step_seconds: the median of all `steps` after the
    warm-up of all `rounds`; rate_ratio: how many times as fast as the first, the median of what each
    round gives. Raises what `command` raises.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder, run = Path(scratch) / "easy-vqa", Path(scratch) / "run"
        command("data", "easy-vqa", str(folder), "--samples-per-shard", str(SAMPLES_PER_SHARD))
        least = ["blank_every=0", "checkpoint_every=0", f"steps={WARMUP + steps}", f"run={run}"]
        least += shards(folder, "000000")
        took: dict[str, list[list[float]]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, overrides in ways.items():
                command("train", str(RECIPE), *overrides, *least)
                took[name].append(seconds(run, WARMUP))
                shutil.rmtree(run)
    recipes = {name: read_recipe(RECIPE, [*overrides]) for name, overrides in ways.items()}
    first = [statistics.median(part) for part in next(iter(took.values()))]
    return {name: _rates(recipes[name], parts, first) for name, parts in took.items()}


def _rates(recipe: Recipe, parts: Sequence[Sequence[float]], first: Sequence[float]) -> dict[str, Any]:
    """Of one way; parts: the seconds of each round, first: the medians of the way compared with."""
    median = statistics.median(second for part in parts for second in part)
    ratios = sorted(other / statistics.median(own) for own, other in zip(parts, first, strict=True))
    return {
        "step_seconds": float(f"{median:.4g}"),
        "samples_per_second": float(f"{sum(source.batch for source in recipe.sources) / median:.4g}"),
        "rate_ratio": round(statistics.median(ratios), 3),
        "rate_ratio_range": [round(ratios[0], 3), round(ratios[-1], 3)],
    }


def seconds(run: Path, warmup: int) -> list[float]:
    """Of each step after the warm-up, with the wait for data."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record["seconds"] for record in records if record.get("step", 0) > warmup]

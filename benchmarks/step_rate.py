"""The quickstart's step: its share of the measured matrix-multiplication peak, and 2 ranks against 1.

    python -m benchmarks.step_rate [--steps 40] [--rounds 2] [--data data]

Runs `flamingo train` itself on the quickstart recipe, in turn with one rank on all cores and with
two ranks on half of them each, and takes the seconds of its metrics.jsonl once the grids of all
pictures are held (the shards are small, so that this is soon). FLOPs are the model's
(`flamingo.train.flops`); the peak is that of bfloat16 products on all cores, measured before every run and
after the last: the best counts, and where the worst is far below it the machine was not quiet. Prints one
line of JSON per number of ranks and one that compares them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from flamingo.data.batch import Batch
from flamingo.data.steps import StepDataset, open_feeds
from flamingo.factory import create
from flamingo.quickstart import RECIPE, backbones, shards
from flamingo.runtime import cores, quiet_libraries, tune_cpu
from flamingo.train.config import Recipe, read_recipe
from flamingo.train.flops import measured_peak, step_flops

SAMPLES_PER_SHARD = 40


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--data", type=Path, default=Path("data"), help="with backbones/, as `make quickstart`"
    )
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warmup", type=int, default=22, help="steps that are not counted")
    parser.add_argument("--rounds", type=int, default=2, help="runs with each number of ranks")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of the recipe, e.g. compile=true")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    return parser.parse_args()


def flamingo(*words: str, **environment: str) -> None:
    """A command of its own process. Raises RuntimeError with the end of what it said."""
    done = subprocess.run(
        [sys.executable, "-m", "flamingo.cli", *words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"flamingo {words[0]} failed: {(done.stderr or done.stdout)[-2000:]}")


def overrides(options: argparse.Namespace, folder: Path) -> list[str]:
    return [
        *backbones(options.data),
        *shards(folder, "000000"),
        f"steps={options.steps}",
        "blank_every=0",
        "checkpoint_every=0",
        *options.set,
    ]


def contents(recipe: Recipe) -> Iterator[tuple[float, dict[str, Any]]]:
    """FLOPs of each step once no picture is encoded any more, and what it holds."""
    model, processor = create(
        vision=recipe.model.vision,
        language=recipe.model.language,
        frozen_dtype=getattr(torch, recipe.model.frozen_dtype),
        **recipe.model.architecture,
    )
    feeds = open_feeds(
        recipe.sources,
        seed=recipe.seed,
        tokenizer=processor.tokenizer,
        transform=processor.image_processor.transform,  # type: ignore[attr-defined]
        image_token_id=model.config.image_token_id,
        end_of_chunk_id=model.config.end_of_chunk_token_id,
    )
    dataset = StepDataset(feeds, skip_pixels=lambda key: True)
    for step in range(recipe.steps):
        batches = [batch for part in dataset[step].values() for batch in part]
        held: dict[str, Any] = {
            name: sum(count[name] for count in map(_count, batches)) for name in _count(batches[0])
        }
        yield step_flops(model, **held, pictures=0), held


def _count(batch: Batch) -> dict[str, int]:
    lengths = batch.attention_mask.sum(dim=1)
    return {
        "tokens": int(lengths.sum()),
        "targets": batch.n_targets,
        "images": len(batch.image_keys),
        "pairs": int(lengths.square().sum()),
    }


def seconds(run: Path, warmup: int) -> list[float]:
    """Of each step after the warm-up, with the wait for data."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record["seconds"] for record in records if record.get("step", 0) > warmup]


def peak() -> float:
    """FLOP/s of bfloat16 products on all cores, or on one GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    measured_peak.cache_clear()
    return measured_peak(device, torch.bfloat16)


def measure(options: argparse.Namespace, scratch: Path) -> None:
    folder = scratch / "easy-vqa"
    flamingo("data", "easy-vqa", str(folder), "--samples-per-shard", str(SAMPLES_PER_SHARD))
    changed = overrides(options, folder)
    peaks, times = [], {ranks: [] for ranks in options.ranks}
    for number in range(options.rounds):
        for ranks in options.ranks:
            peaks.append(peak())
            run = scratch / f"ranks-{ranks}-{number}"
            flamingo("train", str(RECIPE), f"run={run}", *changed, "--processes", str(ranks))
            times[ranks].append(seconds(run, options.warmup))
    peaks.append(peak())
    steps = list(contents(read_recipe(RECIPE, [f"run={scratch / 'none'}", *changed])))[options.warmup :]
    flops = statistics.mean(each for each, _ in steps)
    for ranks, runs in times.items():
        devices = ranks if torch.cuda.is_available() else 1
        shown = [each * devices for each in peaks]
        print(json.dumps(row(ranks, runs, flops, shown, [held for _, held in steps])), flush=True)
    if {1, 2} <= times.keys():
        one, two = (statistics.median(sum(times[ranks], [])) for ranks in (1, 2))
        print(json.dumps({"two_ranks_times_as_fast_as_one": round(one / two, 3)}))


def row(
    ranks: int, runs: list[list[float]], flops: float, peaks: list[float], held: list[dict[str, int]]
) -> dict:
    """What is printed of a number of ranks."""
    best = max(peaks)
    median = statistics.median(sum(runs, []))
    means: dict[str, Any] = {name: round(statistics.mean(h[name] for h in held)) for name in held[0]}
    return {
        "ranks": ranks,
        "threads_each": max(1, cores() // ranks),
        "seconds_per_step": round(median, 4),
        "fastest": round(min(min(run) for run in runs), 4),
        "medians_of_runs": [round(statistics.median(run), 4) for run in runs],
        "gflop_per_step": round(flops / 1e9, 1),
        "peak_gflops": round(best / 1e9, 1),
        "peak_gflops_range": [round(min(peaks) / 1e9, 1), round(best / 1e9, 1)],
        "peak_share": round(flops / median / best, 4),
        **means,
    }


def main() -> None:
    options = arguments()
    quiet_libraries()
    tune_cpu()
    if not (options.data / "backbones").is_dir():
        raise SystemExit(
            f"{options.data / 'backbones'} is not there: flamingo backbones {options.data}/backbones"
        )
    with tempfile.TemporaryDirectory() as scratch:
        measure(options, Path(scratch))


if __name__ == "__main__":
    main()

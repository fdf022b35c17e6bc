"""The quickstart's step: its share of the measured matrix-multiplication peak, and 2 ranks against 1.

    python -m benchmarks.step_rate [--steps 40] [--rounds 2] [--data data]

Trains the quickstart recipe with `flamingo train`'s own ranks, in turn one with all cores and two with half
of them each, and takes the steps that encode no picture, after the grids of all are held (the shards are
small, so that this is soon). FLOPs are the model's (`flamingo.train.flops`). The peak is that of products
in the run's arithmetic (bfloat16, or float32 where the processor has none) on all cores, measured before and
after every step (`benchmarks.beside_peak`): the share is each step's own, and the median counts. Prints one
line of JSON per number of ranks and one that compares them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from flamingo.quickstart import RECIPE, backbones, shards
from flamingo.runtime import cores

SAMPLES_PER_SHARD = 8  # few, so that each of two ranks has seen all pictures before the counted steps


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


def python(what: str, *words: str) -> None:
    """A process of its own. Raises RuntimeError with the end of what it said."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{what} failed: {(done.stderr or done.stdout)[-2000:]}")


def overrides(options: argparse.Namespace, folder: Path) -> list[str]:
    return [
        *backbones(options.data),
        *shards(folder, "000000"),
        f"steps={options.steps}",
        "blank_every=0",
        "checkpoint_every=0",
        *options.set,
        "log_every=1",  # the wait for data is read of every step
    ]


def beside(run: Path, warmup: int) -> list[dict[str, float]]:
    """Of each step after the warm-up that encodes nothing: its seconds with the wait for data, what it
    held, and the peak of all ranks around it."""
    ranks = [list(map(json.loads, path.read_text().splitlines())) for path in run.glob("beside-*.jsonl")]
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    waited = {record["step"]: record["data_seconds"] for record in records if "data_seconds" in record}
    return [
        {
            **of_ranks[0],
            "seconds": max(line["seconds"] for line in of_ranks) + waited[of_ranks[0]["step"]],
            "peak": sum(line["peak"] for line in of_ranks),
        }
        for of_ranks in zip(*ranks, strict=True)
        if of_ranks[0]["step"] > warmup and not any(line["pictures"] for line in of_ranks)
    ]


def measure(options: argparse.Namespace, scratch: Path) -> None:
    folder = scratch / "easy-vqa"
    words = ("data", "easy-vqa", str(folder), "--samples-per-shard", str(SAMPLES_PER_SHARD))
    python("writing shards", "-m", "flamingo.cli", *words)
    changed = overrides(options, folder)
    steps: dict[int, list[list[dict[str, float]]]] = {ranks: [] for ranks in options.ranks}
    for number in range(options.rounds):
        for ranks in options.ranks:
            run = scratch / f"ranks-{ranks}-{number}"
            train(run, changed, ranks)
            steps[ranks].append(beside(run, options.warmup))
            arithmetic = yaml.safe_load((run / "recipe.yaml").read_text())["autocast"]
            if not steps[ranks][-1]:
                raise SystemExit(
                    f"no step of {ranks} ranks after the warm-up that encodes nothing: raise --steps"
                )
    for ranks, runs in steps.items():
        print(json.dumps({**row(ranks, runs), "arithmetic": arithmetic}), flush=True)
    if {1, 2} <= steps.keys():
        print(json.dumps(compared(steps[1], steps[2])))


def train(run: Path, changed: list[str], ranks: int) -> None:
    """`flamingo train` of the quickstart's recipe, with a peak beside each step."""
    words = [str(RECIPE), f"run={run}", *changed]
    code = "import sys; from flamingo.train.launch import start; "
    code += "sys.exit(start('benchmarks.beside_peak', sys.argv[2:], int(sys.argv[1])))"
    python("training", "-c", code, str(ranks), *words)


def row(ranks: int, runs: list[list[dict[str, float]]]) -> dict[str, Any]:
    """What is printed of a number of ranks. peak_share: the median over steps of each step's own."""
    steps = sum(runs, [])
    shares = sorted(step["flops"] / step["seconds"] / step["peak"] for step in steps)
    peaks = sorted(step["peak"] / 1e9 for step in steps)
    seconds = sorted(step["seconds"] for step in steps)
    held = ("tokens", "targets", "images")
    return {
        "ranks": ranks,
        "threads_each": max(1, cores() // ranks),
        "seconds_per_step": round(statistics.median(seconds), 4),
        "fastest": round(seconds[0], 4),
        "medians_of_runs": [round(statistics.median(s["seconds"] for s in run), 4) for run in runs],
        "gflop_per_step": round(statistics.mean(step["flops"] for step in steps) / 1e9, 1),
        "peak_gflops": round(statistics.median(peaks), 1),
        "peak_gflops_range": [round(peaks[0], 1), round(peaks[-1], 1)],
        "peak_share": round(statistics.median(shares), 4),
        "peak_share_quartiles": [round(x, 4) for x in statistics.quantiles(shares, n=4)[::2]],
        **{name: round(statistics.mean(step[name] for step in steps)) for name in held},
    }


def compared(one: list[list[dict[str, float]]], two: list[list[dict[str, float]]]) -> dict[str, Any]:
    """How many times as fast two ranks are, round by round."""
    medians = ([statistics.median(step["seconds"] for step in run) for run in runs] for runs in (one, two))
    ratios = sorted(a / b for a, b in zip(*medians, strict=True))
    return {
        "two_ranks_times_as_fast_as_one": round(statistics.median(ratios), 3),
        "range": [round(ratios[0], 3), round(ratios[-1], 3)],
    }


def main() -> None:
    options = arguments()
    if not (options.data / "backbones").is_dir():
        raise SystemExit(
            f"{options.data / 'backbones'} is not there: flamingo backbones {options.data}/backbones"
        )
    with tempfile.TemporaryDirectory() as scratch:
        measure(options, Path(scratch))


if __name__ == "__main__":
    main()

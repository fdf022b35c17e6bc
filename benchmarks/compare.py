"""The ways to join sight and language, side by side: trained, asked and timed on the quickstart's data.

    python -m benchmarks.compare [--steps N] [--questions N] [--only WAY ...] [--out runs/compare]

Each way is the quickstart's recipe with another connector and fusion: the same samples in the same
order, the same steps, the same frozen parts; a prefix learns at ten times the rate, with adapters (LoRA) in
the language model. A prefix without them, `frozen`, is trained when `--only` names it. `--set WAY:key=value`
changes one of them. Speeds are measured afterwards, all in turn.
Every part that is done is not done again: stopped at any moment, the same command goes on.
Writes compare-fusions.html, .json and .md into the folder, which holds a run folder for each way.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks import compare_rates, compare_report, compare_times
from flamingo.eval.session import fingerprint
from flamingo.quickstart import RECIPE, backbones, shards
from flamingo.runtime import quiet_libraries
from flamingo.train.config import Recipe, read_recipe

# What the quickstart asks: 0 shots on all test questions, 4 shots and the controls on a sample.
ASKED = ["--benchmark", "easy_vqa", "--shots", "0", "--shots", "4", "--zero-shot", "none", "--beams", "1"]
SAMPLE = 500
# A prefix has no blocks that could turn the frozen model's words into the data's: its vectors must do
# that too, and at the quickstart's rate they are slow. And the frozen model does not compare what it
# is told with what it is asked; adapters learn it, as the gated blocks do (docs/decisions.md).
PREFIX = ["model.architecture.fusion=prefix", "optimizer.lr=3.0e-3"]
ADAPTED = [*PREFIX, "lora={rank: 16, alpha: 32}", "optimizer.lr_factors={lora: 0.1}"]
# What --only, --set and run folders call it -> its name, and what is not the quickstart's.
WAYS: dict[str, tuple[str, list[str]]] = {
    "perceiver": ("cross-attention + perceiver", []),
    "linear": ("prefix + linear, LoRA", ["model.architecture.connector=linear", *ADAPTED]),
    "mlp": ("prefix + mlp, LoRA", ["model.architecture.connector=mlp", *ADAPTED]),
    "frozen": ("prefix + mlp", ["model.architecture.connector=mlp", *PREFIX]),
}
USUAL = ["perceiver", "linear", "mlp"]


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder of all that is made")
    parser.add_argument("--data", type=Path, default=Path("data"), help="with backbones and shards")
    parser.add_argument("--steps", type=int, help="fewer end sooner; default: the recipe's")
    parser.add_argument(
        "--questions", type=int, help="test questions of each setting; default: as quickstart"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(WAYS),
        default=USUAL,
        metavar="WAY",
        help=f"of {', '.join(WAYS)}; default: {' '.join(USUAL)}",
    )
    parser.add_argument("--set", nargs="*", default=[], help="of the recipe, for all or WAY:key=value")
    parser.add_argument("--shots", type=int, nargs="+", default=[0, 4, 16], help="of the timed answers")
    parser.add_argument("--answers", type=int, default=8, help="that are timed in a round")
    parser.add_argument("--timed-steps", type=int, default=8, help="of training, that are timed in a round")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts")
    options = parser.parse_args(given)
    for name in ("steps", "questions", "answers", "timed_steps", "rounds"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: must be at least 1")
    options.only = list(dict.fromkeys(options.only))
    options.shots = sorted(set(options.shots))
    if options.shots[0] < 0:
        parser.error(f"--shots {options.shots[0]}: must be at least 0")
    return options


@dataclass
class Way:
    """One connector with one fusion, and where its run lies."""

    name: str
    run: Path
    overrides: list[str] = field(default_factory=list)

    @property
    def model(self) -> Path:
        return self.run / "model"

    @property
    def recipe(self) -> Recipe:
        return read_recipe(RECIPE, self.overrides)

    def trained(self) -> bool:
        """Whether its training ended. Raises ValueError for a run of other settings."""
        held = self.run / "recipe.yaml"
        if not held.is_file():
            return False
        before = Recipe.model_validate(yaml.safe_load(held.read_text())).identity()
        wanted = self.recipe.identity()
        if changed := sorted(key for key in wanted if wanted[key] != before.get(key)):
            raise ValueError(
                f"{self.run} holds a run with other settings ({', '.join(changed)}): set them back, or "
                "choose another folder with --out"
            )
        summary = self.run / "train.json"
        return (
            summary.is_file()
            and (self.model / "config.json").is_file()
            and json.loads(summary.read_text())["steps"] == self.recipe.steps
        )


def ways(options: argparse.Namespace) -> list[Way]:
    """Those that are asked for, in the order of `WAYS`. Raises ValueError for an override of none of them."""
    found = []
    own: dict[str, list[str]] = {short: [] for short in WAYS}
    for override in options.set:
        start, colon, rest = override.partition(":")
        if colon and "=" not in start:
            if start not in own:
                raise ValueError(f"--set {override}: {start!r} is none of {', '.join(own)}")
            own[start].append(rest)
        else:
            for each in own.values():
                each.append(override)
    for short, (name, changed) in WAYS.items():
        if short not in options.only:
            continue
        run = options.out / short
        overrides = [
            f"run={run}",
            *backbones(options.data),
            *shards(options.data / "easy-vqa"),
            *changed,
            *([f"steps={options.steps}"] if options.steps else []),
            *own[short],
        ]
        found.append(Way(name, run, overrides))
    return found


def flamingo(*words: str) -> None:
    """A command in a process of its own. Raises ValueError when it fails."""
    status = subprocess.run([sys.executable, "-m", "flamingo.cli", *words]).returncode
    if status:
        raise ValueError(
            f"flamingo {words[0]} failed with status {status}; its message is above. The same command goes on"
        )


def prepare(data: Path) -> None:
    """Backbones and shards; what is there is kept."""
    flamingo("backbones", str(data / "backbones"))
    flamingo("data", "easy-vqa", str(data / "easy-vqa"))


def train(way: Way) -> None:
    if not way.trained():
        resume = ["--resume"] if (way.run / "recipe.yaml").is_file() else []
        flamingo("train", str(RECIPE), *way.overrides, *resume)


def evaluate(way: Way, questions: int | None) -> None:
    """Asks what the quickstart asks, unless this model was asked just that."""
    sample = str(min(SAMPLE, questions or SAMPLE))
    asked = [*ASKED, "--shots-limit", sample, "--control-limit", sample]
    asked += ["--limit", str(questions)] if questions else []
    mark = way.run / "asked.json"
    wanted = {"asked": asked, "fingerprint": fingerprint(way.model)}
    done = way.run / "eval.json"
    if fresh := _read(mark) != wanted:  # what was asked before, if anything, was something else
        done.unlink(missing_ok=True)
        _write(mark, wanted)
    if not done.is_file():
        again = ["--overwrite"] if fresh else []
        flamingo("eval", "run", str(way.model), "--out", str(way.run), *again, *asked)


def timed(found: list[Way], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds per answer of all models, taken in turn in this process; kept until one of them changes."""
    settings = {"shots": options.shots, "answers": options.answers, "rounds": options.rounds}
    wanted = {**settings, "models": {way.name: fingerprint(way.model) for way in found}}
    held = _read(options.out / "times.json")
    if held and held["of"] == wanted:
        return held["times"]
    times = compare_times.measure({way.name: way.model for way in found}, **settings)
    _write(options.out / "times.json", {"of": wanted, "times": times})
    return times


def rates(found: list[Way], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds per step of all ways, trained in turn; kept until a setting changes."""
    overrides = {way.name: way.overrides for way in found}
    wanted = {"steps": options.timed_steps, "rounds": options.rounds, "overrides": overrides}
    held = _read(options.out / "rates.json")
    if held and held["of"] == wanted:
        return held["rates"]
    measured = compare_rates.measure(overrides, options.timed_steps, options.rounds, flamingo)
    _write(options.out / "rates.json", {"of": wanted, "rates": measured})
    return measured


def _read(path: Path) -> Any:
    """None where there is no file, or one that was cut off."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _write(path: Path, fields: Any) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(fields, indent=1) + "\n")
    os.replace(part, path)


def main(given: list[str] | None = None) -> Path:
    """Everything, part by part; the page's path. Raises SystemExit with one line where a part fails."""
    options = arguments(given)
    quiet_libraries()
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{(time.monotonic() - began) / 60:.1f} min] {text}", flush=True)

    try:
        found = ways(options)
        for way in found:
            way.trained()  # settings that do not fit are told before anything is paid for
        say("backbones and shards")
        prepare(options.data)
        options.out.mkdir(parents=True, exist_ok=True)
        for way in found:
            say(f"training: {way.name}")
            train(way)
            say(f"evaluation: {way.name}")
            evaluate(way, options.questions)
        say(f"times per answer at {', '.join(map(str, options.shots))} shots")
        times = timed(found, options)
        say(f"{options.timed_steps} training steps of each in turn, {options.rounds} rounds")
        speeds = rates(found, options)
        say("report")
        whole = read_recipe(RECIPE).steps
        runs = [(way.name, way.run) for way in found]
        page = compare_report.write(options.out, runs, times, speeds, whole)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print((options.out / "compare-fusions.md").read_text())
    print(page.resolve())
    return page


if __name__ == "__main__":
    main()

"""The main job, end to end, on the embedded default: every step is a command of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

# 0 shots on all test questions; 4 shots and the controls, which are slower, on a sample.
ASKED = [
    *("--benchmark", "easy_vqa", "--shots", "0", "--shots", "4", "--zero-shot", "none", "--beams", "1"),
    *("--shots-limit", "1000", "--control-limit", "1000"),
]
RECIPE = Path(__file__).parent / "train" / "recipes" / "quickstart.yaml"
FAMILIES = {"captions": "pairs", "questions": "documents"}  # source -> its shards


def backbones(data: Path) -> list[str]:
    """Overrides of the recipe: the two that lie in DATA/backbones."""
    folder = data / "backbones"
    return [
        f"model.vision=timm:{folder / 'efficientnet-lite0'}",
        f"model.language={folder / 'smollm2-135m-instruct'}",
    ]


def shards(folder: Path, number: str = "*") -> list[str]:
    """Overrides of the recipe: those shards of each source that have this number."""
    return [f"sources.{name}.shards={folder / f'{family}-{number}.tar'}" for name, family in FAMILIES.items()]


def main(run: Path, data: Path, steps: int | None, say: Callable[[str], None]) -> None:
    """Convert, pack, train, evaluate, report; finished parts of an earlier try are kept.

    Raises ValueError when a part fails, with what to do about it.
    """
    say(
        "Quickstart: convert two frozen backbones, write easy-VQA as shards, train the connecting part\n"
        "on two CPU processes (or all GPUs), ask 13,673 test questions, write a report.\n"
        "25 to 60 minutes on two cores; `make quickstart STEPS=100` ends sooner and knows less."
    )
    began = time.monotonic()
    overrides = [f"run={run}", *([f"steps={steps}"] if steps else [])]
    overrides += [*backbones(data), *shards(data / "easy-vqa")]
    parts = [
        ("frozen backbones", ["backbones", str(data / "backbones")]),
        ("shards", ["data", "easy-vqa", str(data / "easy-vqa")]),
    ]
    if not _trained(run, steps):
        resume = ["--resume"] if (run / "recipe.yaml").is_file() else []
        parts.append(("training", ["train", str(RECIPE), *overrides, *resume]))
    parts.append(("evaluation", ["eval", "run", str(run / "model"), "--out", str(run), *ASKED]))
    for number, (what, arguments) in enumerate(parts, 1):
        say(f"[{number}/{len(parts) + 1}] {what}")
        status = subprocess.run([sys.executable, "-m", "flamingo.cli", *arguments]).returncode
        if status:
            raise ValueError(f"{what} failed with status {status}; its message is above. "
                             f"The same command goes on where it stopped.")  # fmt: skip
    say(f"[{len(parts) + 1}/{len(parts) + 1}] report")
    (run / "timing.json").write_text(json.dumps({"total_seconds": round(time.monotonic() - began, 1)}))
    from flamingo.eval.report import write_report

    path = write_report(run)
    say(f"Done in {(time.monotonic() - began) / 60:.1f} minutes. Open {path.resolve()}")


def _trained(run: Path, steps: int | None) -> bool:
    """Whether an earlier try ended the training that is asked for."""
    summary = run / "train.json"
    if not summary.is_file() or not (run / "model" / "config.json").is_file():
        return False
    wanted = steps or yaml.safe_load(RECIPE.read_text())["steps"]
    return json.loads(summary.read_text())["steps"] == wanted

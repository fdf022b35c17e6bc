"""Evaluations made without a model: a benchmark of colours, and an answerer that sees as well as asked."""

from __future__ import annotations

import base64
import io
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from flamingo.eval.benchmarks import Example, File
from flamingo.eval.config import EvalConfig
from flamingo.eval.few_shot import Prompt
from flamingo.eval.results.summary import summarise
from flamingo.eval.run import Part
from flamingo.eval.session import Plan
from flamingo.eval.task import Task

NAME = "some_package.colours"
COLOURS = ("red", "green", "blue", "yellow")
KINDS = ("what colour", "which paint")


def benchmark(folder: Path, monkeypatch: pytest.MonkeyPatch, queries: int = 80, **changes) -> ModuleType:
    """Pictures of one colour each, asked for it; importable as `NAME` until the test ends."""
    folder.mkdir(exist_ok=True)

    def examples(data, split):
        drawn = random.Random(split)
        found = []
        for number in range(queries):
            colour = drawn.choice(COLOURS)
            image = folder / f"{split}-{number}-{colour}.png"
            if not image.exists():
                Image.new("RGB", (8, 8), colour).save(image)
            found.append(
                Example(f"{split}{number}", image, f"colour {number}?", (colour,), KINDS[number % 2])
            )
        return found

    module = ModuleType(NAME)
    vars(module).update(
        TITLE="Colours",
        DESCRIPTION="pictures of one colour",
        LICENCE="none",
        SOURCE="nowhere",
        FILES={"train": (File("colours.json", "nowhere"),), "test": ()},
        BUNDLED=True,
        QUERIES="test",
        DEMONSTRATIONS="train",
        METRICS=("exact_match",),
        MAX_NEW_TOKENS=3,
        BLIND=0.25,
        CLASSES=lambda data: (" yes", " no"),
        examples=examples,
        prompt=lambda e: f"{e.question} It is",
        completion=lambda e: f" {e.answers[0]}",
        tidy=lambda text: text.strip().lower(),
    )
    vars(module).update(changes)
    monkeypatch.setitem(sys.modules, "some_package", ModuleType("some_package"))
    monkeypatch.setitem(sys.modules, NAME, module)
    return module


class Answerer:
    """Says the colour that it sees, in a share of the queries; else one of its shots', or a guess."""

    def __init__(self, sight: float, copying: float = 0.0, salt: int = 0):
        self.sight, self.copying, self.salt = sight, copying, salt

    def predict(self, prompts: list[Prompt]) -> Iterator[tuple[Prompt, str]]:
        for prompt in prompts:
            drawn = random.Random(f"{self.salt}/{prompt.example.id}")
            image, luck, copies = prompt.images[0], drawn.random(), drawn.random()
            said = drawn.choice(COLOURS)
            if prompt.shots and copies < self.copying:
                said = prompt.shots[-1].answers[0]
            elif image is not None and luck < self.sight:
                said = image.stem.rsplit("-", 1)[1]
            yield prompt, f" {said}"

    def rank(self, prompts: list[Prompt], classes) -> Iterator[tuple[Prompt, tuple[float, ...]]]:
        for prompt in prompts:
            drawn = random.Random(f"{self.salt}/{prompt.example.id}")
            yes = self.sight if prompt.example.answers == ("yes",) else -self.sight
            yield prompt, (yes + drawn.gauss(0, 0.5), 0.0)


def write(out: Path, answerer: Answerer, fingerprint: str = "f", **settings) -> Path:
    """A finished evaluation's folder: eval.json, gallery.json and answers."""
    config = EvalConfig(**{"benchmark": NAME, "shots": (0, 4), "zero_shot": "none", **settings})
    task, answers = Task.of(config), out / "answers"
    Plan("runs/x/model", fingerprint, config).claim(answers)
    for setting in config.settings():
        Part(task, config, answerer, answers, 0, 1, quiet=True).run(setting)
    figures = summarise(task, config, answers, 12.5) | {"model": "runs/x/model", "fingerprint": fingerprint}
    (out / "eval.json").write_text(json.dumps(figures))
    (out / "gallery.json").write_text(json.dumps([entry(), entry(setting="4-shot", shots=SHOTS)]))
    return out


def png(colour: str = "blue") -> str:
    held = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(held, "PNG")
    return base64.b64encode(held.getvalue()).decode()


SHOTS = [{"image_png": png("red"), "answer": "red"}, {"image_png": None, "answer": "yellow"}]


def entry(**changes) -> dict:
    """Of a gallery."""
    return {
        "setting": "0-shot",
        "image_png": png(),
        "question": "what colour?",
        "answer": "blue",
        "prediction": "red",
        "correct": False,
        "score": 0.0,
        "kind": KINDS[0],
        "words": [{"word": "red", "map": [[0.5, 0.25], [0.25, 0.0]]}],
        "shots": [],
        **changes,
    }

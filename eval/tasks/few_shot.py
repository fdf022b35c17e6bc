"""What the YAML files here name: documents, prompts, messages and figures of a benchmark.

A task's data file has one row, its settings: benchmark, shots and seed; data, shots_from, split, pool and
limit where they differ from `flamingo eval run`'s; choice: rank the answers instead of generating one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from flamingo.data.transforms import decode_image
from flamingo.eval import metrics
from flamingo.eval.benchmarks import Example, Prediction
from flamingo.eval.config import EvalConfig
from flamingo.eval.few_shot import Prompt, Setting, build, choose_shots, sample
from flamingo.eval.task import Task
from flamingo.processing import END_OF_CHUNK, IMAGE

MOST_CHOICES = 100  # of a benchmark that has no classes of its own


@dataclass(frozen=True)
class Run:
    """Settings that were read, with their data."""

    task: Task
    setting: Setting
    choices: tuple[str, ...]
    examples: Mapping[str, Example]

    def prompt(self, doc: Mapping[str, Any]) -> Prompt:
        query = self.examples[doc["id"]]
        shots = choose_shots(self.task.pool, query, self.setting)
        return build(self.task.benchmark, query, shots, self.setting)


@lru_cache(maxsize=8)
def opened(settings: str) -> Run:
    """The run of a row of settings, as JSON. Raises ValueError as `flamingo eval run` would."""
    given = {name: value for name, value in json.loads(settings).items() if value is not None}
    choice = bool(given.pop("choice", False))
    config = EvalConfig(**{**given, "shots": (given["shots"],), "control_limit": 0})
    task = Task.of(config)
    (setting,) = config.settings()
    queries = sample(task.queries, setting)
    return Run(task, setting, _choices(task) if choice else (), {query.id: query for query in queries})


def _choices(task: Task) -> tuple[str, ...]:
    """Continuations that are ranked: the benchmark's classes, or all answers of the demonstrations."""
    if task.classes:
        return task.classes
    found = tuple(sorted({task.benchmark.completion(shot) for shot in task.pool}))
    if not 2 <= len(found) <= MOST_CHOICES:
        raise ValueError(
            f"choice: {task.benchmark.TITLE} has {len(found)} different answers in its demonstrations, "
            f"not 2 to {MOST_CHOICES}: leave choice out, so that answers are generated"
        )
    return found


# -- called by lmms-eval -------------------------------------------------------------------


def documents(rows: Any) -> Any:
    """The row of settings -> a dataset of queries. Raises ValueError for more than one row."""
    from datasets import Dataset

    if len(rows) != 1:
        raise ValueError(f"the data file of a task has one row of settings, this one {len(rows)}")
    settings = json.dumps(rows[0], sort_keys=True)
    run = opened(settings)
    found = []
    for query in run.examples.values():
        answer = run.task.benchmark.completion(query) if query.answers else ""
        found.append(
            {
                "settings": settings,
                "id": query.id,
                "question": query.question,
                "answers": list(query.answers),
                "kind": query.kind,
                "image": str(query.image),
                "target": _place(run.choices, answer) if run.choices else answer.strip(),
            }
        )
    return Dataset.from_list(found)


def _place(choices: Sequence[str], answer: str) -> int:
    """Of the right one; -1 where it is none of them."""
    return choices.index(answer) if answer in choices else -1


def choices(doc: Mapping[str, Any]) -> list[str]:
    """What is ranked."""
    return list(opened(doc["settings"]).choices)


def text(doc: Mapping[str, Any]) -> str:
    """The prompt as a Flamingo reads it: shots, each ended by <|endofchunk|>, and the query."""
    prompt = opened(doc["settings"]).prompt(doc)
    return prompt.prefix + prompt.text


def pictures(doc: Mapping[str, Any]) -> list[Any]:
    """The pictures of the prompt, in its order, as PIL images."""
    prompt = opened(doc["settings"]).prompt(doc)
    return [_picture(image) for image in (*prompt.prefix_images, *prompt.images) if image is not None]


def messages(doc: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The prompt as a chat: of each shot a user's turn and the answer, then the query.

    Pictures are named by their paths, so that one that is known need not be opened.
    """
    prompt = opened(doc["settings"]).prompt(doc)
    images = iter((*prompt.prefix_images, *prompt.images))
    benchmark, turns = opened(doc["settings"]).task.benchmark, []
    *shots, _ = prompt.prefix.split(END_OF_CHUNK)
    for shot, example in zip(shots, prompt.shots, strict=True):
        answer = benchmark.completion(example)
        turns.append(_user(shot.removesuffix(answer), images))
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return [*turns, _user(prompt.text, images)]


def results(doc: Mapping[str, Any], answers: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """For each metric of the benchmark what `aggregate` needs of this query.

    answers: a text, or of each choice (minus its log-likelihood, greedy): lmms-eval counts in losses.
    """
    run = opened(doc["settings"])
    if run.choices:
        scores = [-float(loss) for loss, _ in answers]
        said = {"text": run.choices[max(range(len(scores)), key=scores.__getitem__)].strip()}
        said |= {"scores": scores}
    else:
        said = {"text": run.task.benchmark.tidy(answers[0]), "scores": []}
    item = {"settings": doc["settings"], "id": doc["id"], **said}
    return {name: {**item, "metric": name} for name in run.task.benchmark.METRICS}


def aggregate(items: Sequence[Mapping[str, Any]]) -> float:
    """A metric over all queries, as reports show it (of 100 where it is a share)."""
    run, metric = opened(items[0]["settings"]), metrics.load(items[0]["metric"])
    predictions = [Prediction(item["id"], item["text"], tuple(item["scores"])) for item in items]
    return metric.SCALE * metric.value(predictions, [run.examples[item["id"]] for item in items])


def _user(words: str, images: Any) -> dict[str, Any]:
    """A user's turn of a text with <image> marks, each of which takes the next picture."""
    content: list[dict[str, Any]] = []
    for number, part in enumerate(words.split(IMAGE)):
        if number:
            content.append({"type": "image", "url": str(next(images))})
        if part:
            content.append({"type": "text", "text": part})
    return {"role": "user", "content": content}


@lru_cache(maxsize=256)
def _picture(path: Path) -> Any:
    try:
        return decode_image(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"picture {path} cannot be read: {error}") from None

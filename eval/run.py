"""Runs settings of a benchmark: each query exactly once, on one process or several.

Every process takes its share of the queries and writes its answers as they come; results of an
interrupted evaluation are kept and not computed again. Processes need not talk to each other.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

from flamingo.eval import metrics
from flamingo.eval.benchmarks import Example, Prediction
from flamingo.eval.config import EvalConfig
from flamingo.eval.few_shot import Prompt, Setting, blanked, build, choose_shots, sample, shuffled
from flamingo.eval.task import Task


def answers_file(out: Path, setting: Setting, rank: int) -> Path:
    return out / f"{setting.slug}.{rank}.jsonl"


def answer_files(out: Path, setting: Setting) -> list[Path]:
    return sorted(out.glob(f"{setting.slug}.[0-9]*.jsonl"))


def drop_cut_line(path: Path) -> None:
    """An interrupted process may have left half a line, which the next would be written onto."""
    if path.exists() and not path.read_text().endswith("\n"):
        whole = path.read_text().rpartition("\n")
        scratch = path.with_suffix(".part")
        scratch.write_text(whole[0] + whole[1])
        scratch.replace(path)


def read_answers(paths: Iterable[Path]) -> list[dict]:
    """Records of the files that are there; a last line that was cut off is left out."""
    records = []
    for path in paths:
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                records.append(json.loads(line))
            except ValueError:
                break
    return records


@dataclass
class Part:
    """One process's share of an evaluation: what it needs for all settings."""

    task: Task
    config: EvalConfig
    predictor: Any  # flamingo.eval.predictor.Predictor
    out: Path
    rank: int
    world: int
    quiet: bool = False  # no progress, no rate

    def run(self, setting: Setting) -> None:
        """Answer this process's share of a setting; one JSON line per query."""
        path = answers_file(self.out, setting, self.rank)
        drop_cut_line(path)
        # Of any earlier process: shares never overlap, however many processes there were.
        done = {record["id"] for record in read_answers(answer_files(self.out, setting))}
        # Questions about a picture follow each other: one process encodes it.
        whole = sample(self.task.queries, setting)
        mine = whole[self.rank * len(whole) // self.world : (self.rank + 1) * len(whole) // self.world]
        todo = [query for query in mine if query.id not in done]
        began = time.monotonic()
        quiet = self.quiet or self.rank > 0 or not sys.stderr.isatty()
        bar = tqdm(
            total=len(mine), initial=len(mine) - len(todo), desc=setting.name, unit="query", disable=quiet
        )
        with path.open("a") as file, bar:
            for record in self._records(todo, setting):
                file.write(json.dumps(record) + "\n")
                file.flush()
                bar.update()
        if self.rank == 0 and quiet and todo and not self.quiet:
            rate = len(todo) / (time.monotonic() - began)
            print(f"{setting.name}: {len(mine)} queries, {rate:.1f}/s in each process", flush=True)

    def _records(self, todo: list[Example], setting: Setting) -> Iterator[dict]:
        if not todo:
            return
        shots = {query.id: self._shots(query, setting) for query in todo}
        for query, prediction, raw in self._answered(todo, shots, setting):
            yield self._record(query, shots[query.id], prediction, raw)

    def _shots(self, query: Example, setting: Setting) -> list[Example]:
        return choose_shots(self.task.pool, query, setting, self.task.neighbours)

    def _record(self, query: Example, shots: Sequence[Example], prediction: Prediction, raw: str) -> dict:
        benchmark, scores = self.task.benchmark, None
        if self.task.scores_alone:
            scores = metrics.load(benchmark.METRICS[0]).per_sample([prediction], [query])
        return {
            "id": query.id,
            "question": query.question,
            "answers": list(query.answers),
            "kind": query.kind,
            "image": str(query.image),
            "prediction": prediction.text,
            "raw": raw,
            "scores": list(prediction.scores),
            "shots": [
                {"id": s.id, "image": str(s.image), "answer": benchmark.tidy(benchmark.completion(s))}
                for s in shots
            ],
            "score": scores[0] if scores else None,
        }

    def _answered(
        self, todo: Sequence[Example], shots: dict[str, list[Example]], setting: Setting
    ) -> Iterator[tuple[Example, Prediction, str]]:
        """(query, prediction, text as generated), as they come; after all orders where there are several."""
        prompts = [
            build(
                self.task.benchmark,
                query,
                shuffled(shots[query.id], order, query),
                setting,
                self.task.template(order),
            )
            for order in range(self.config.ensemble)
            for query in todo
        ]
        answered = self._ranked(prompts) if self.task.classes else self._generated(prompts)
        if self.config.ensemble == 1:
            yield from answered
            return
        held: dict[str, list[tuple[Prediction, str]]] = {}
        for query, prediction, raw in answered:
            held.setdefault(query.id, []).append((prediction, raw))
            if len(held[query.id]) == self.config.ensemble:
                yield query, *together(held.pop(query.id), self.task.classes)

    def _generated(self, prompts: list[Prompt]) -> Iterator[tuple[Example, Prediction, str]]:
        for prompt, raw in self.predictor.predict(prompts):
            example = prompt.example
            yield example, Prediction(example.id, self.task.benchmark.tidy(raw)), raw

    def _ranked(self, prompts: list[Prompt]) -> Iterator[tuple[Example, Prediction, str]]:
        """The likeliest class of each prompt; calibrated, relative to the same prompt about a blank."""
        lengths = self._lengths()
        for prompt, scores in self.predictor.rank(prompts, self.task.classes):
            if self.config.calibrate:
                ((_, bias),) = self.predictor.rank([blanked(prompt)], self.task.classes)
                scores = tuple(s - b for s, b in zip(scores, bias, strict=True))
            scores = tuple(s / length for s, length in zip(scores, lengths, strict=True))
            text = self.task.best(scores)
            yield prompt.example, Prediction(prompt.example.id, text, tuple(scores)), text

    def _lengths(self) -> list[int]:
        """What likelihoods are divided by: tokens of each class where the benchmark takes their mean."""
        classes = self.task.classes
        if not getattr(self.task.benchmark, "MEAN_LIKELIHOOD", False):
            return [1] * len(classes)
        ids = self.predictor.processor.tokenizer(list(classes), add_special_tokens=False)["input_ids"]
        return [len(each) for each in ids]


def together(answers: Sequence[tuple[Prediction, str]], classes: Sequence[str]) -> tuple[Prediction, str]:
    """One answer of several orders: the mean of the log-likelihoods, or the commonest text, of which
    the first that was given where several are as common."""
    first = answers[0][0]
    if classes:
        means = tuple(sum(each) / len(answers) for each in zip(*(p.scores for p, _ in answers), strict=True))
        text = classes[max(range(len(means)), key=means.__getitem__)].strip()
        return Prediction(first.id, text, means), text
    counts = Counter(prediction.text for prediction, _ in answers)
    common = max(counts.values())
    return next((p, raw) for p, raw in answers if counts[p.text] == common)


def check_complete(
    benchmark: ModuleType, out: Path, setting: Setting, queries: Sequence[Example]
) -> list[dict]:
    """The records of a setting in the order of its queries.

    Raises ValueError unless each query was answered exactly once.
    """
    records = read_answers(answer_files(out, setting))
    wanted = [query.id for query in sample(queries, setting)]
    by_id = {record["id"]: record for record in records}
    if len(records) != len(wanted) or by_id.keys() != set(wanted):
        raise ValueError(
            f"{out}: {setting.slug} has {len(records)} answers to {len(by_id)} questions of "
            f"{benchmark.TITLE}, {len(wanted)} were asked; delete the folder, or run again with --overwrite"
        )
    return [by_id[each] for each in wanted]

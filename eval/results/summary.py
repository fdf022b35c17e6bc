"""Answers -> figures: what eval.json holds (see `flamingo.eval.results`)."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from types import ModuleType
from typing import Any

from flamingo.eval import metrics
from flamingo.eval.benchmarks import Example, Prediction
from flamingo.eval.config import EvalConfig
from flamingo.eval.few_shot import Setting
from flamingo.eval.results.statistics import Clusters, interval, interval_of_whole
from flamingo.eval.run import check_complete
from flamingo.eval.task import Task

PACKAGES = ("flamingo-vlm", "torch", "transformers", "open_clip_torch")
Sides = tuple[list[Prediction], list[Example]]


def summarise(task: Task, config: EvalConfig, answers: Path, seconds: float) -> dict[str, Any]:
    """All figures of a finished evaluation, but for whose they are (model and fingerprint).

    answers: the folder of records; seconds: what the evaluation took. Where examples have no published
    answers, or a metric has no value (ROC-AUC of one class) or too few queries for an interval, the
    setting lacks that metric, and its "note" says why. Raises ValueError unless each query of each
    setting was answered exactly once.
    """
    benchmark = task.benchmark
    found = [metrics.load(name) for name in benchmark.METRICS]
    by_name: dict[str, list[Setting]] = {}
    for setting in config.settings():
        by_name.setdefault(setting.name, []).append(setting)
    return {
        "benchmark": config.benchmark,
        "title": benchmark.TITLE,
        "description": benchmark.DESCRIPTION,
        "split": config.split or benchmark.QUERIES,
        "blind": benchmark.BLIND,
        "config": config.model_dump(mode="json"),
        "versions": versions(),
        "seconds": round(seconds, 3),
        "metrics": [
            {"name": name, "title": metric.TITLE, "scale": metric.SCALE}
            for name, metric in zip(benchmark.METRICS, found, strict=True)
        ],
        "settings": [_setting(task, answers, seeds) for seeds in by_name.values()],
    }


def versions() -> dict[str, str | None]:
    """Of what an evaluation ran with; None for what is not installed."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return {**found, "python": platform.python_version(), "platform": platform.platform()}


def _setting(task: Task, answers: Path, seeds: Sequence[Setting]) -> dict[str, Any]:
    """One setting with all its seeds."""
    by_seed = [check_complete(task.benchmark, answers, seed, task.queries) for seed in seeds]
    queries = {query.id: query for query in task.queries}
    sides = [_sides(records, queries) for records in by_seed]
    first = seeds[0]
    described: dict[str, Any] = {
        "name": first.name,
        "shots": first.shots,
        "control": first.control,
        "source": first.source,
        "seeds": [seed.seed for seed in seeds],
        "n": len(by_seed[0]),
        "metrics": {},
        "copied": copied([record for records in by_seed for record in records]),
    }
    asked = {example.id: example for _, examples in sides for example in examples}
    if without := sum(not example.answers for example in asked.values()):
        note = f"{without:,} of {len(asked):,} queries have no published answer, so nothing is scored"
        return {**described, "note": f"{note}; what was said is in {answers.name}"}
    for name in task.benchmark.METRICS:
        if figures := _figures(metrics.load(name), sides):
            described["metrics"][name] = figures
    if lacking := [n for n in task.benchmark.METRICS if n not in described["metrics"]]:
        described["note"] = f"{', '.join(lacking)}: no value, or no interval, of these {len(asked):,} queries"
    return described


def _sides(records: list[dict[str, Any]], queries: dict[str, Example]) -> Sides:
    predictions = [Prediction(r["id"], r["prediction"], tuple(r["scores"])) for r in records]
    return predictions, [queries[record["id"]] for record in records]


def _figures(metric: ModuleType, sides: Sequence[Sides]) -> dict[str, Any] | None:
    """Value, interval, spread and kinds of a metric; None where it has no value or interval."""
    per_sample = [metric.per_sample(*side) for side in sides]
    if any(values is None for values in per_sample):
        return _of_whole(metric, sides)
    by_query = [
        {example.id: value for example, value in zip(examples, values, strict=True)}
        for (_, examples), values in zip(sides, per_sample, strict=True)
    ]
    by_seed = [fmean(values.values()) for values in by_query]
    kinds = {example.id: example.kind for _, examples in sides for example in examples}
    by_kind = {}
    for kind in sorted(set(kinds.values()) - {""}):
        of_kind = Clusters.of([{q: v for q, v in values.items() if kinds[q] == kind} for values in by_query])
        by_kind[kind] = {"n": len(of_kind.sums), "value": of_kind.mean}
    return _described(by_seed, interval(Clusters.of(by_query)), by_kind)


def _of_whole(metric: ModuleType, sides: Sequence[Sides]) -> dict[str, Any] | None:
    by_seed = [metric.value(*side) for side in sides]
    if not all(math.isfinite(value) for value in by_seed):
        return None
    places = list(dict.fromkeys(example.id for _, examples in sides for example in examples))
    at = [{example.id: i for i, example in enumerate(examples)} for _, examples in sides]

    def compute(drawn: Sequence[int]) -> float:
        values = []
        for (predictions, examples), here in zip(sides, at, strict=True):
            rows = [here[places[place]] for place in drawn if places[place] in here]
            if rows:
                values.append(metric.value([predictions[i] for i in rows], [examples[i] for i in rows]))
        return fmean(values) if values else math.nan

    value = fmean(by_seed)
    span = interval_of_whole(compute, len(places), value, len(sides))
    return _described(by_seed, span, {}) if math.isfinite(span[0]) else None


def _described(by_seed: list[float], span: tuple[float, float], by_kind: dict[str, Any]) -> dict[str, Any]:
    return {
        "value": fmean(by_seed),
        "interval": list(span),
        "by_seed": by_seed,
        "spread": stdev(by_seed) if len(by_seed) > 1 else None,
        "by_kind": by_kind,
    }


def copied(records: Sequence[dict[str, Any]]) -> float | None:
    """Share of the predictions that are the answer of one of their own shots, but for case; None
    without shots."""
    shown = [record for record in records if record["shots"]]
    return fmean(map(copies, shown)) if shown else None


def copies(record: dict[str, Any]) -> bool:
    said = record["prediction"].strip().lower()
    return said in {shot["answer"].strip().lower() for shot in record["shots"]}

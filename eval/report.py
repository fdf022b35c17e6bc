"""A run's report: one page to read (report.html), its figures (report.json) and a picture (example.png).

Reads the files that training and evaluation left in a run's folder; needs neither of the two, nor
a model. What was not measured is said to be so, never left out.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from flamingo.eval import charts, example, findings, page

# The settings that a report tells of: key in report.json -> (shots, control) in eval.json.
SETTINGS = {
    "accuracy": (0, None),
    "accuracy_image_blank": (0, "blank"),
    "accuracy_4shot": (4, None),
    "accuracy_text_only_shots": (4, "text_only_shots"),
    "accuracy_shuffled_shots": (4, "shuffled_shots"),
}
FIRST = 5  # steps left out of the throughput: the first ones warm up
TAIL = 20  # steps that a final loss is the mean of
SCORED = (("correct", bool), ("score", float))  # of an entry of the gallery
SHOT_SIDE = 96  # pixels of a shot's picture in the page
BLANK_TAIL = 5  # the same for losses with blanked pictures, which are measured now and then


def write_report(run: Path) -> Path:
    """Write report.html and report.json into the folder `run`; returns the page's path.

    Needs metrics.jsonl and train.json; takes recipe.yaml, eval.json, gallery.json and timing.json
    where they are there. With a gallery, example.png is a strip of four entries without shots.

    Raises:
        ValueError: a file is missing or damaged; says which, and what to do.
    """
    records = read_metrics(run / "metrics.jsonl")
    train = read_train(run / "train.json")
    evaluation, timing = read_json(run / "eval.json"), read_json(run / "timing.json")
    recipe_text, recipe = read_recipe(run / "recipe.yaml")
    gallery = read_gallery(run / "gallery.json")
    report = figures(run.resolve().name, records, train, evaluation, timing)
    html = page.render(report, records, gallery, recipe, recipe_text)
    (run / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    (run / "report.html").write_text(html, encoding="utf-8")
    example.write_example(run / example.NAME, [e for e in gallery if e["setting"] == "0-shot"])
    return run / "report.html"


def has_page(run: Path) -> bool:
    """Whether one run has a page of its own: it has ended, and what it trained answers (no encoder does)."""
    if not (run / "metrics.jsonl").exists():
        return True  # which says what is missing
    _, recipe = read_recipe(run / "recipe.yaml")
    return (run / "train.json").exists() and answers(recipe)


def answers(recipe: dict[str, Any]) -> bool:
    """Whether a run of this recipe trains what answers: an encoder's has no sources. Without one: yes."""
    return not recipe or "sources" in recipe


# ---- reading -----------------------------------------------------------------------------------


def read_json(path: Path, kind: type = dict) -> Any:
    """What a JSON file holds, or None where there is none. Raises ValueError for a damaged one."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, kind):
            raise ValueError(f"expected a {kind.__name__}, found a {type(found).__name__}")
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}): delete it and run the step that writes it again"
        ) from None
    return found


def read_train(path: Path) -> dict[str, Any]:
    """The summary of the training. Raises ValueError when it is missing or lacks a figure."""
    found = read_json(path)
    if found is None:
        raise ValueError(
            f"{path} is not there: it is written when training ends; finish the run "
            "(--resume goes on with it), or name another run's folder"
        )
    for key in ("steps", "train_seconds"):
        if not isinstance(found.get(key), (int, float)):
            raise ValueError(
                f"{path} is damaged ({key} is {found.get(key)!r}, not a number): "
                "delete it and run the step that writes it again"
            )
    return found


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of the optimizer steps, in order. Raises ValueError, naming the line."""
    if not path.exists():
        raise ValueError(
            f"{path} is not there: training writes it; name the folder of a run that was trained"
        )
    records: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            record = json.loads(line)
            values = [record["step"], record["seconds"], *record["loss"].values()]
            if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
                raise ValueError("a figure is not a finite number")
            if records and record["step"] <= records[-1]["step"]:
                raise ValueError(f"step {record['step']} follows step {records[-1]['step']}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}, line {number} is not the record of a step ({error!r}): remove the line "
                "if it is the last, which a stopped run may cut off; else train again"
            ) from None
        records.append(record)
    if not records:
        raise ValueError(f"{path} is empty: the run did no step; train it, then write the report")
    return records


def read_recipe(path: Path) -> tuple[str | None, dict[str, Any]]:
    """The recipe as it stands and as keys and values; None and nothing where there is none."""
    if not path.exists():
        return None, {}
    try:
        text = path.read_text(encoding="utf-8")
        fields = yaml.safe_load(text)
        if not isinstance(fields, dict):
            raise ValueError(f"expected keys and values, found a {type(fields).__name__}")
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): put the recipe of the run back, or delete the file"
        ) from None
    return text, fields


def read_gallery(path: Path) -> list[dict[str, Any]]:
    """Test pictures and what was answered: "image" is decoded, those of shots too, each word's "map" an
    array; "correct" and "score" None for answers that have none by themselves.

    Empty where there is no file. Raises ValueError, naming the entry.
    """
    entries = []
    for number, entry in enumerate(read_json(path, list) or [], 1):
        try:
            texts = {key: str(entry[key]) for key in ("question", "answer", "prediction", "kind", "setting")}
            words = [{"word": str(w["word"]), "map": _grid(w["map"])} for w in entry["words"]]
            image, shots = charts.picture(entry["image_png"]), [_shot(shot) for shot in entry["shots"]]
            correct, score = (entry[key] if entry[key] is None else kind(entry[key]) for key, kind in SCORED)
            marks = {"correct": correct, "score": score}
            entries.append({**texts, **marks, "image": image, "words": words, "shots": shots})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, entry {number} is damaged ({error!r}): evaluate again") from None
    return entries


def _shot(shot: dict[str, Any]) -> dict[str, Any]:
    png = shot["image_png"]
    return {"image": None if png is None else charts.picture(png, SHOT_SIDE), "answer": str(shot["answer"])}


def _grid(rows: Any) -> np.ndarray:
    """float64[rows, columns] of a word's attention."""
    grid = np.array(rows, dtype=float)
    if grid.ndim != 2 or not grid.size or not np.isfinite(grid).all() or grid.min() < 0:
        raise ValueError("a map must be rows x columns of numbers from 0 on")
    return grid


# ---- figures -----------------------------------------------------------------------------------


def figures(
    name: str,
    records: list[dict[str, Any]],
    train: dict[str, Any],
    evaluation: dict[str, Any] | None,
    timing: dict[str, Any] | None,
) -> dict[str, Any]:
    """All that report.json holds. None stands for what was not measured."""
    evaluation = evaluation or {}
    train_seconds, eval_seconds = train["train_seconds"], evaluation.get("seconds")
    total = (timing or {}).get("total_seconds")
    if total is None and eval_seconds is not None:
        total = round(train_seconds + eval_seconds, 1)
    report = {
        "run": name,
        "benchmark": evaluation.get("benchmark"),
        "description": evaluation.get("description"),
        **_accuracies(evaluation),
        "blind_accuracy": evaluation.get("blind"),
        "train_seconds": train_seconds,
        "eval_seconds": eval_seconds,
        "total_seconds": total,
        **_throughput(records),
        "steps": train["steps"],
        **{key: train.get(key) for key in ("resumed_at", "ranks", "device")},
        **{key: train.get(key) for key in ("trained_parameters", "frozen_parameters")},
        **_final_losses(records),
        "step_seconds": step_seconds(records, train.get("resumed_at") or 0),
        "skipped": sum(record.get("skipped", 0) for record in records),
        "versions": _versions(),
    }
    report["headline"], report["reading"] = findings.headline(report), findings.reading(report)
    report["notes"] = findings.notes(report, records[-1]["step"])
    return report


def _accuracies(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Score, interval, number of questions, kinds and share of copied answers of every setting of
    `SETTINGS`."""
    out: dict[str, Any] = dict.fromkeys(SETTINGS)
    intervals, questions, kinds, copied = (dict.fromkeys(SETTINGS) for _ in range(4))
    try:
        by_how = {(s["shots"], s["control"]): s for s in evaluation.get("settings", [])}
        for key, how in SETTINGS.items():
            setting = by_how.get(how, {"metrics": {}})
            if figures := setting["metrics"].get(evaluation["metrics"][0]["name"]) if by_how else None:
                out[key], intervals[key] = figures["value"], list(figures["interval"])
                questions[key], copied[key] = setting["n"], setting["copied"]
                by_kind = figures["by_kind"].items()
                kinds[key] = {kind: {"n": each["n"], "accuracy": each["value"]} for kind, each in by_kind}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"eval.json is of another version or damaged ({error!r}): evaluate again") from None
    return {**out, "intervals": intervals, "questions": questions, "by_kind": kinds, "copied": copied}


def _throughput(records: list[dict[str, Any]]) -> dict[str, float | None]:
    """Samples, tokens and images per second of the steps, without the first `FIRST`."""
    steady = records[min(FIRST, len(records) // 2) :]
    seconds = sum(record["seconds"] for record in steady)
    return {
        f"{key}_per_second": round(sum(r[key] for r in steady) / seconds, 3)
        if seconds > 0 and all(key in r for r in steady)
        else None
        for key in ("samples", "tokens", "images")
    }


def step_seconds(records: list[dict[str, Any]], since: int = 0) -> float | None:
    """Seconds of the steps after `since`; None where not every step is recorded (`log_every`)."""
    counted = [record["seconds"] for record in records if record["step"] > since]
    return round(sum(counted), 1) if len(counted) == records[-1]["step"] - since else None


def _final_losses(records: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Means over the last steps; the blanked losses with those of the same batches beside them."""
    blanked = [record for record in records if record.get("loss_blank")][-BLANK_TAIL:]
    return {
        "final_loss": _mean_by_source(record["loss"] for record in records[-TAIL:]),
        "final_loss_blank": _mean_by_source(record["loss_blank"] for record in blanked),
        "final_loss_beside_blank": _mean_by_source(record["loss"] for record in blanked),
    }


def _mean_by_source(losses: Iterable[dict[str, float]]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for loss in losses:
        for source, value in loss.items():
            values.setdefault(source, []).append(value)
    return {source: round(float(np.mean(v)), 6) for source, v in values.items()}


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "transformers", "deepspeed"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions

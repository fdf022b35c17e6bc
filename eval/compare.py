"""Several runs side by side: one page (compare.html) and its figures (compare.json).

Reads what training has written so far, so a run may still go on, or have been killed: only
metrics.jsonl must be there, and its last line may be cut off. Needs no model and no network.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.resources
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from flamingo.eval import charts, page, report
from flamingo.eval.charts import Curve

LETTERS = "ABCDEFGH"
TAIL = 20  # steps that a final figure is the mean of
ABSENT = "not set"
COUNTS = ("pictures", "captions", "left_out")  # that held-out scores of an encoder are of


@dataclass
class Run:
    """What is known of one run; `records` are its steps in order, each once."""

    name: str
    path: Path
    records: list[dict[str, Any]]
    recipe: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def last(self) -> int:
        return self.records[-1]["step"]

    @property
    def steps(self) -> int | None:
        """How many it shall do, None where nothing says so."""
        found = (self.train or {}).get("steps") or self.recipe.get("steps")
        return found if isinstance(found, int) else None

    @property
    def finished(self) -> bool:
        return self.train is not None and self.train.get("steps") == self.last


def write_comparison(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write compare.html and compare.json into `out`, or the first run's folder; the page's path.

    Raises:
        ValueError: no run, too many, one twice, or a file that is missing or damaged; says which.
    """
    if not 1 <= len(folders) <= len(LETTERS):
        raise ValueError(f"{len(folders)} runs: a page compares 1 to {len(LETTERS)}; name fewer")
    runs = [read_run(folder, name) for folder, name in zip(folders, short_names(folders), strict=True)]
    comparison = {"runs": [figures(run) for run in runs], "settings": differences(runs)}
    html = render(runs, comparison)
    folder = out or folders[0]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compare.json").write_text(json.dumps(comparison, indent=1, allow_nan=False) + "\n")
    (folder / "compare.html").write_text(html, encoding="utf-8")
    return folder / "compare.html"


# ---- reading -------------------------------------------------------------------------------------


def short_names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many parents as tell them apart. ValueError: one twice."""
    paths = [folder.resolve() for folder in folders]
    twice = [str(path) for number, path in enumerate(paths) if path in paths[:number]]
    if twice:
        raise ValueError(f"{', '.join(twice)} is named twice: name each run once")
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def read_run(folder: Path, name: str) -> Run:
    """What the folder holds so far. Raises ValueError, naming the file."""
    records, notes = read_records(folder / "metrics.jsonl")
    _, recipe = report.read_recipe(folder / "recipe.yaml")
    train, evaluation = (report.read_json(folder / file) for file in ("train.json", "eval.json"))
    notes += _changes(folder / "changes.jsonl")
    run = Run(name, folder, records, recipe, train, evaluation, notes)
    if not run.finished:
        written = datetime.datetime.fromtimestamp((folder / "metrics.jsonl").stat().st_mtime, tz=datetime.UTC)
        of = f" of {run.steps:,}" if run.steps else ""
        notes.append(
            f"goes on, or was stopped: its last record is step {run.last:,}{of}, "
            f"written {written:%Y-%m-%d %H:%M} UTC"
        )
    return run


def _changes(path: Path) -> Iterator[str]:
    """What was set otherwise when the run went on."""
    for line in path.read_text("utf-8").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            change = json.loads(line)
            told = ", ".join(f"{key}={_text(value)}" for key, value in change["settings"].items())
            yield f"went on after step {change['after_step']:,} with {told}"


def read_records(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The steps in order and what is to be said about the file.

    A last line that is cut off is left out; so are other lines that are no records, which is
    said. Of a step that is there twice the later record counts. Raises ValueError without any.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not there: training writes it; name the folder of a run")
    by_step: dict[int, dict[str, Any]] = {}
    lines = path.read_bytes().splitlines()
    bad = []
    for number, line in enumerate(lines, 1):
        record = _record(line)
        if record is not None:
            by_step[record["step"]] = record
        elif number < len(lines):
            bad.append(number)
    if not by_step:
        raise ValueError(f"{path} has no step yet: wait for the run's first step")
    notes = [f"metrics.jsonl: line {_listed(bad)} is no record and left out"] if bad else []
    return [by_step[step] for step in sorted(by_step)], notes


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (f" and {len(numbers) - 5} more" if len(numbers) > 5 else "")


def _record(line: bytes) -> dict[str, Any] | None:
    """A step's record, its losses without what is not finite; None for anything else."""
    try:
        record = json.loads(line, parse_constant=lambda _: None)
        if not _number(record["step"]) or not _number(record["seconds"]):
            return None
        record["step"] = int(record["step"])
        for key in ("loss", "loss_blank"):
            losses = record.get(key) or {}
            record[key] = {str(name): value for name, value in losses.items() if _number(value)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return record


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# ---- figures -------------------------------------------------------------------------------------


def figures(run: Run) -> dict[str, Any]:
    """The final figures of one run; None stands for what was not measured."""
    train = {"steps": run.steps or run.last, "train_seconds": 0.0, **(run.train or {})}
    found = report.figures(run.name, run.records, train, run.evaluation, None)
    dropped = ("versions", "notes", "headline", "by_kind", "description", "step_seconds", "total_seconds")
    kept = {key: value for key, value in found.items() if key not in dropped}
    tail = run.records[-TAIL:]
    return {
        **kept,
        "train_seconds": (run.train or {}).get("train_seconds"),
        "folder": str(run.path),
        "finished": run.finished,
        "last_step": run.last,
        "seconds_of_steps": report.step_seconds(run.records),
        "worth": worth(found),
        "gate_attention": _last(run.records, "gate_attention"),
        "gate_feed_forward": _last(run.records, "gate_feed_forward"),
        **{key: _mean(tail, key) for key in ("grad_norm", "data_share", "padding_share", "peak_share")},
        "flops_per_second": _mean(tail, "flops_per_second"),
        "memory_gb": max((r["memory_gb"] for r in run.records if _number(r.get("memory_gb"))), default=None),
        "skipped_steps": sum(1 for record in run.records if record.get("step_skipped")),
        "notes": run.notes,
    }


def worth(found: Mapping[str, Any]) -> dict[str, float]:
    """Source -> what its images are worth: the share of the blanked loss that they take away."""
    beside = found["final_loss_beside_blank"]
    return {
        name: round((blank - beside[name]) / max(blank, 1e-9), 4)
        for name, blank in found["final_loss_blank"].items()
        if name in beside
    }


def _last(records: Sequence[Mapping[str, Any]], key: str) -> Any:
    return next((r[key] for r in reversed(records) if _all_numbers(r.get(key))), None)


def _mean(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [record[key] for record in records if _number(record.get(key))]
    return float(f"{np.mean(values):.6g}") if values else None


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Settings that are not alike in all runs: dotted key -> one value a run, None: not set."""
    flat = [dict(_settings(run.recipe)) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    values = {key: [settings.get(key) for settings in flat] for key in keys if key != "run"}
    return {key: row for key, row in values.items() if any(value != row[0] for value in row[1:])}


def _settings(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a recipe by their dotted keys; sources go by their names, as in overrides."""
    if isinstance(value, list) and value and all(isinstance(v, dict) and "name" in v for v in value):
        value = {str(inner["name"]): inner for inner in value}
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _settings(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value if isinstance(value, (int, float, bool, type(None))) else _text(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


# ---- the page ------------------------------------------------------------------------------------


def render(runs: Sequence[Run], comparison: Mapping[str, Any]) -> str:
    """The page as HTML; all text from files is escaped."""
    assert __package__ is not None
    template = importlib.resources.files(__package__).joinpath("compare.html.jinja").read_text("utf-8")
    found = comparison["runs"]
    view = {
        "runs": list(zip(LETTERS, found, strict=False)),
        "sources": list(dict.fromkeys(name for one in found for name in one["final_loss"])),
        "losses": loss_charts(runs),
        "sections": [part for part in (_looking(runs), _learning(runs), _speed(runs)) if part[1]],
        "settings": comparison["settings"],
        "unit": "target token" if any(report.answers(run.recipe) for run in runs) else "pair",
        "absent": ABSENT,
    }
    environment = page.environment()
    environment.filters |= {
        "loss": lambda value: f"{value:.3f}",
        "tera": lambda value: f"{value / 1e12:.3g}\u00a0TFLOP/s",
    }
    return environment.from_string(template).render(view)


def loss_charts(runs: Sequence[Run]) -> list[tuple[str, Markup]]:
    """(source, chart): solid as trained, dashed with blanked images; a run's top 2 % may be cut off."""
    names = dict.fromkeys(name for run in runs for record in run.records for name in record["loss"])
    drawn = []
    for name in names:
        curves, tops = [], [0.0]
        for number, run in enumerate(runs):
            seen, blank = (_series(run.records, key, name) for key in ("loss", "loss_blank"))
            if seen[0]:
                curves.append(Curve(seen, number, LETTERS[number], smooth=True))
            if blank[0]:
                curves.append(Curve(blank, number, dashed=True))
            if every := [*seen[1], *blank[1]]:  # of each run: a long one would hide a short one
                tops.append(float(np.quantile(every, 0.98)))
        drawn.append((name, charts.compared(curves, f"Loss of {name}", large=True, top=max(tops) or 1.0)))
    return drawn


Charts = list[tuple[str, str, Markup]]


def _looking(runs: Sequence[Run]) -> tuple[str, Charts]:
    """What the images are worth, source by source, and the gates."""
    drawn: Charts = []
    for name in dict.fromkeys(name for run in runs for r in run.records for name in r["loss_blank"]):
        curves = []
        for number, run in enumerate(runs):
            both = [r for r in run.records if name in r["loss_blank"] and name in r["loss"]]
            shares = [100 * (1 - r["loss"][name] / max(r["loss_blank"][name], 1e-9)) for r in both]
            if both:
                curves.append(Curve(([r["step"] for r in both], shares), number, LETTERS[number]))
        if curves:
            title = f"Worth of the images: {name}"
            caption = "% of the blanked loss that they take away; 0: it does not look"
            drawn.append((title, caption, charts.compared(curves, title)))
    for key, title in (("gate_attention", "Attention gates"), ("gate_feed_forward", "Feed-forward gates")):
        curves = [curve for number, run in enumerate(runs) if (curve := _gates(run, number, key))]
        if curves:
            caption = "|tanh|, mean of the blocks; pale: from the lowest to the highest; 0 is shut"
            drawn.append((title, caption, charts.compared(curves, title)))
    return "Does it look?", drawn


def _gates(run: Run, number: int, key: str) -> Curve | None:
    kept = [record for record in run.records if _all_numbers(record.get(key))]
    values = [[abs(value) for value in record[key]] for record in kept]
    if not kept:
        return None
    band = [min(row) for row in values], [max(row) for row in values]
    means = [float(np.mean(row)) for row in values]
    return Curve(([record["step"] for record in kept], means), number, LETTERS[number], band=band)


def _all_numbers(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(_number(value) for value in values)


def _learning(runs: Sequence[Run]) -> tuple[str, Charts]:
    """Scores while it trained, learning rates and gradient norms, of the whole and of each group."""
    batch = "% of a batch whose caption is the most alike"
    return "How it learns", [
        *_charts(
            runs, "scores", "Score", "of the evaluations while it trained", smooth=False, without=COUNTS
        ),
        *_charts(runs, "accuracy", "Right captions", batch, scale=100),
        *_charts(runs, "logit_scale", "Scale of the logits", smooth=False),
        *_charts(runs, "grad_norm", "Gradient norm", "of all trained weights, before clipping", log=True),
        *_charts(runs, "grad_norms", "Gradient norm", log=True),
        *_charts(runs, "lr", "Learning rate", smooth=False),
        *_charts(runs, "lrs", "Learning rate", smooth=False),
    ]


def _speed(runs: Sequence[Run]) -> tuple[str, Charts]:
    """Throughput, where the time goes, and memory."""
    peak = "model FLOP/s, % of measured matrix products"
    return "Speed and memory", [
        *_charts(runs, "samples_per_second", "Samples per second"),
        *_charts(runs, "tokens_per_second", "Tokens per second"),
        *_charts(runs, "images_per_second", "Images per second"),
        *_charts(runs, "data_share", "Waiting for data", "% of a step's time", scale=100),
        *_charts(runs, "padding_share", "Padding", "% of the places in rows", scale=100),
        *_charts(runs, "peak_share", "Share of the peak", peak, scale=100),
        *_charts(runs, "flops_per_second", "Model TFLOP/s", scale=1e-12),
        *_charts(runs, "memory_gb", "Memory", "the most so far, GB", smooth=False),
    ]


def _charts(
    runs: Sequence[Run],
    key: str,
    title: str,
    caption: str = "",
    scale: float = 1.0,
    log: bool = False,
    smooth: bool = True,
    without: Sequence[str] = (),
) -> Charts:
    """One chart of a figure, or one for each part of a figure that has parts (groups of weights).

    None where no run has it. smooth: with its running mean; without: parts that are not drawn.
    """
    every = (part for run in runs for record in run.records for part in _mapping(record.get(key)))
    parts = dict.fromkeys(part for part in every if part not in without)
    drawn: Charts = []
    for part in (None, *parts):
        named = title if part is None else f"{title}: {str(part).replace('_', ' ')}"
        curves = []
        for number, run in enumerate(runs):
            steps, values = _series(run.records, key, part)
            if steps:
                series = steps, [scale * value for value in values]
                curves.append(Curve(series, number, LETTERS[number], smooth=smooth))
        if curves:
            drawn.append((named, caption, charts.compared(curves, named, log=log)))
    return drawn


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _series(records: Sequence[Mapping[str, Any]], key: str, inner: str | None = None) -> tuple[list, list]:
    """Steps and values of a figure, or of one part of it, where it is a finite number."""
    values = [(r["step"], r.get(key) if inner is None else _mapping(r.get(key)).get(inner)) for r in records]
    kept = [(step, value) for step, value in values if _number(value)]
    return [step for step, _ in kept], [value for _, value in kept]

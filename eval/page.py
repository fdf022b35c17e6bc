"""A report's page: figures, charts and pictures in one file that opens from disk.

Takes what `report` has read and worked out; the wording of tables and charts is here and in
report.html.jinja, that of conclusions in `findings`.
"""

from __future__ import annotations

import importlib.resources
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from flamingo.eval import charts, findings

# Accuracy in report.json -> its name in tables, what is asked, and whether it is a control.
NAMES = {
    "accuracy": ("0 shots", "the test picture and its question", False),
    "accuracy_image_blank": ("0 shots, images blanked", "every picture made empty", True),
    "accuracy_4shot": ("4 shots", "four answered questions with their pictures come first", False),
    "accuracy_text_only_shots": (
        "4 shots without images",
        "those four lose their pictures; the test picture stays",
        True,
    ),
    "accuracy_shuffled_shots": (
        "4 shots, pictures mixed up",
        "each of the four has the picture of another",
        True,
    ),
}


def render(
    report: dict[str, Any],
    records: list[dict[str, Any]],
    gallery: list[dict[str, Any]],
    recipe: dict[str, Any],
    recipe_text: str | None,
) -> str:
    """The page as HTML; all text from files is escaped."""
    view = {
        "report": report,
        "rows": _rows(report),
        "kinds": _kinds(report),
        "losses": _losses(records),
        "curves": _curves(records, recipe),
        "gallery": drawn_gallery([entry for entry in gallery if entry["setting"] == "0-shot"]),
        "settings": _main_settings(recipe),
        "recipe_text": recipe_text,
        "heat": charts.heat_gradient(),
    }
    return environment().from_string(_template()).render(view)


def environment() -> jinja2.Environment:
    """Escapes all that is filled in; has the filters of figures."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "percent": findings.percent,
        "short": findings.short,
        "duration": findings.duration,
        "count": lambda value: f"{value:,.0f}",
        "rate": lambda value: f"{value:,.0f}" if value >= 100 else f"{value:.1f}",
        "millions": lambda value: f"{value / 1e6:,.1f}\u00a0M",
    }
    return environment


def _template() -> str:
    assert __package__ is not None
    return importlib.resources.files(__package__).joinpath("report.html.jinja").read_text("utf-8")


def _rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Lines of the accuracy table; accuracy None where it was not measured."""
    return [
        {
            "name": name,
            "gloss": gloss,
            "accuracy": report[key],
            "interval": report["intervals"][key],
            "n": report["questions"][key],
            "control": control,
        }
        for key, (name, gloss, control) in NAMES.items()
    ]


def _kinds(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Question kinds, the best answered first, with their accuracy in every setting."""
    by_kind = {key: kinds or {} for key, kinds in report["by_kind"].items()}
    names = {name for kinds in by_kind.values() for name in kinds}
    rows = [
        {
            "name": name,
            "n": by_kind["accuracy"].get(name, {}).get("n"),
            "shares": {key: kinds.get(name, {}).get("accuracy") for key, kinds in by_kind.items()},
        }
        for name in names
    ]
    return sorted(rows, key=lambda row: (-(row["shares"]["accuracy"] or 0.0), row["name"]))


def _series(records: list[dict[str, Any]], key: str) -> tuple[list[float], list[Any]]:
    kept = [record for record in records if record.get(key) not in (None, [])]
    return [record["step"] for record in kept], [record[key] for record in kept]


def _losses(records: list[dict[str, Any]]) -> list[tuple[str, Markup]]:
    """(source, chart) pairs with one scale; the highest 2 % of points may lie above it."""
    seen, blank = _by_source(records, "loss"), _by_source(records, "loss_blank")
    every = [value for part in (seen, blank) for _, y in part.values() for value in y]
    top = float(np.quantile(every, 0.98)) or 1.0
    return [
        (name, charts.losses(name, seen[name], blank.get(name, ([], [])), number, top))
        for number, name in enumerate(seen)
    ]


def _curves(records: list[dict[str, Any]], recipe: dict[str, Any]) -> list[tuple[str, str, Markup]]:
    """(title, caption, chart) of all that is recorded besides the losses."""
    drawn = []
    for key, title in (("attention", "Attention gates"), ("feed_forward", "Feed-forward gates")):
        steps, values = _series(records, f"gate_{key}")
        if values:
            caption = "0 is shut; block 1 is the lowest"
            drawn.append((title, caption, charts.gates(steps, values, title)))
    clip = (recipe.get("optimizer") or {}).get("clip")
    for key, title, caption, options in (
        ("lr", "Learning rate", "", {}),
        ("grad_norm", "Gradient norm", f"dotted: clipped at {clip}", {"log": True, "level": clip}),
        ("samples_per_second", "Samples per second", "in the step itself", {}),
        ("tokens_per_second", "Tokens per second", "in the step itself", {}),
    ):
        series = _series(records, key)
        if series[0]:
            chart = charts.line(series, title, **options)
            drawn.append((title, caption if options.get("level", 1) else "", chart))
    return drawn


def _by_source(records: list[dict[str, Any]], key: str) -> dict[str, tuple[list, list]]:
    """Source -> (steps, losses)."""
    out: dict[str, tuple[list, list]] = {}
    for record in records:
        for name, value in (record.get(key) or {}).items():
            steps, values = out.setdefault(name, ([], []))
            steps.append(record["step"])
            values.append(value)
    return out


def drawn_gallery(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Entries (`report.read_gallery`) with their pictures drawn, and where the colours of all heat maps
    end."""
    top = charts.heat_top([word["map"] for entry in entries for word in entry["words"]])
    drawn = []
    for entry in entries:
        words = [
            {
                "word": word["word"],
                "overlay": charts.data_uri(charts.overlay(entry["image"], word["map"], top), "jpeg"),
                "peak": float(word["map"].max()) * word["map"].size,
            }
            for word in entry["words"]
        ]
        shots = [
            {**shot, "image": shot["image"] and charts.data_uri(shot["image"], "jpeg")}
            for shot in entry["shots"]
        ]
        drawn.append({**entry, "image": charts.data_uri(entry["image"]), "words": words, "shots": shots})
    return {"entries": drawn, "top": top, "right": sum(entry["correct"] is True for entry in entries)}


def _main_settings(recipe: dict[str, Any]) -> dict[str, Any]:
    """What was trained on what: {"lines": [(label, value)], "sources": [{...}]}."""
    lines = []
    for label, key in (
        ("Frozen encoder", "model.vision"),
        ("Frozen language model", "model.language"),
        ("Steps", "steps"),
        ("Seed", "seed"),
        ("Learning rate", "optimizer.lr"),
        ("Schedule", "optimizer.schedule"),
        ("Warm-up steps", "optimizer.warmup_steps"),
        ("Arithmetic", "autocast"),
        ("ZeRO stage", "zero_stage"),
    ):
        value: Any = recipe
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            lines.append((label, value))
    architecture = (recipe.get("model") or {}).get("architecture") or {}
    lines += [(key.replace("_", " ").capitalize(), value) for key, value in architecture.items()]
    sources = [source for source in recipe.get("sources") or [] if isinstance(source, dict)]
    return {"lines": lines, "sources": sources}

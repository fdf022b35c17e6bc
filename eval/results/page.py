"""An evaluation's page: eval.html beside eval.json, one file that opens from disk.

Wording of tables is here and in page.html.jinja, that of conclusions in `controls`.
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Any

from flamingo.eval.few_shot import CONTROLS, SOURCES
from flamingo.eval.results import published
from flamingo.eval.results.controls import Control, Copying, controls, copying
from flamingo.eval.results.reading import Evaluation

KINDS = 24  # in the table, those of most queries
WORDS = 8  # heat maps of an answer
SETTINGS = {  # of the config, as the page calls them
    "data": "Data",
    "shots": "Shots",
    "shots_from": "Shots are",
    "pool": "Demonstrations drawn from",
    "zero_shot": "Without shots",
    "trials": "Seeds",
    "seed": "First seed",
    "limit": "Queries at most",
    "shots_limit": "The same with shots",
    "control_shots": "Shots of controls",
    "control_limit": "Queries of controls at most",
    "beams": "Beams",
    "max_new_tokens": "New tokens at most",
    "ensemble": "Orders put together",
    "calibrate": "Calibrated",
    "index": "Index",
    "similarity": "Similar in",
    "tokens_per_batch": "Tokens per batch",
}


def write(out: Path) -> Path:
    """Write eval.html into an evaluation's folder; returns its path.

    Needs eval.json and the answers; takes gallery.json where it is there. Raises ValueError for what is
    missing or damaged, and without matplotlib.
    """
    try:
        from flamingo.eval import report
    except ImportError as error:
        raise ValueError(
            f"eval.html needs {error.name}: pip install 'flamingo-vlm[eval]', then the same command "
            "again; eval.json and the answers are there"
        ) from None
    evaluation = Evaluation.read(out)
    gallery = report.read_gallery(out / "gallery.json")
    html = environment().get_template("page.html.jinja").render(view(evaluation, gallery))
    path = out / "eval.html"
    path.write_text(html, encoding="utf-8")
    return path


def environment() -> Any:
    """The house's jinja2.Environment, with the templates of this folder."""
    import jinja2

    from flamingo.eval import page

    assert __package__ is not None
    folder = importlib.resources.files(__package__)
    made = page.environment()
    made.loader = jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text("utf-8"))
    return made


def view(evaluation: Evaluation, gallery: list[dict[str, Any]]) -> dict[str, Any]:
    """All that the template fills in."""
    from flamingo.eval import charts, page

    figures, first = evaluation.figures, evaluation.figures["metrics"][0]
    found, parroting = controls(evaluation), copying(evaluation)
    others = published.of(figures["benchmark"])
    rows = [_row(setting, figures["metrics"]) for setting in figures["settings"]]
    tops = [row["cells"][0]["high"] for row in rows if row["cells"][0]]
    kept = [{**e, "words": e["words"][:WORDS]} for e in gallery]
    return {
        "figures": figures,
        "first": first,
        "headline": headline(evaluation, found),
        "reading": reading(evaluation, found, parroting),
        "notes": sorted({f"{s['name']}: {s['note']}." for s in figures["settings"] if s.get("note")}),
        "rows": rows,
        "top": max([first["scale"], *tops]),
        "answers": sum(s["n"] * len(s["seeds"]) for s in figures["settings"]),
        "curve": _curve(evaluation, others),
        "others": sorted({other.family for other in others}, key=list(published.SOURCES).index),
        "sources": published.SOURCES,
        "controls": [(each, each.sentence(first["scale"])) for each in found],
        "copying": [(each, each.sentence()) for each in parroting],
        "kinds": _kinds(evaluation),
        "gallery": page.drawn_gallery(kept),
        "settings": _settings(evaluation),
        "heat": charts.heat_gradient(),
    }


# ---- sentences -----------------------------------------------------------------------------------


def headline(evaluation: Evaluation, found: list[Control]) -> str:
    """The score at the fewest and at the most shots, beside that with blanked pictures."""
    figures, first = evaluation.figures, evaluation.figures["metrics"][0]
    scored = {s["shots"]: s["metrics"].get(first["name"]) for s in figures["settings"] if not s["control"]}
    scored = {shots: value for shots, value in sorted(scored.items()) if value}
    if not scored:
        return f"{figures['title']}, {figures['split']}: answered, not scored."
    ends = list(dict.fromkeys([min(scored), max(scored)]))
    said = [f"{first['scale'] * scored[shots]['value']:.1f} with {_shots(shots)}" for shots in ends]
    sentence = f"{figures['title']}: {first['title']} {' and '.join(said)}"
    blank = next((each for each in found if each.control == "blank" and each.plain is not None), None)
    if blank:
        value = f"{first['scale'] * blank.value:.1f}"
        sentence += {
            1: f"; with blanked pictures it falls to {value}",
            0: f"; with blanked pictures it scores as much ({value})",
            -1: f"; with blanked pictures it even rises to {value}",
        }[blank.verdict]
    return sentence + "."


def _shots(count: int) -> str:
    return f"{count or 'no'} shot{'s' if count != 1 else ''}"


def reading(evaluation: Evaluation, found: list[Control], parroting: list[Copying]) -> list[str]:
    """What follows, the judgement first."""
    from flamingo.eval import findings

    figures, first = evaluation.figures, evaluation.figures["metrics"][0]
    sentences = [each.sentence(first["scale"]) for each in found if each.plain is not None]
    plain = [s for s in figures["settings"] if not s["control"] and first["name"] in s["metrics"]]
    if plain and figures["blind"] is not None:
        blind, span = figures["blind"], plain[0]["metrics"][first["name"]]["interval"]
        value = f"{first['scale'] * blind:.1f}"
        sentences.append(
            {
                1: f"Without looking, {value} would be possible; this is more.",
                0: f"That is no better than the {value} that is possible without looking.",
                -1: f"That is less than the {value} that is possible without looking.",
            }[findings.compare(span, [blind, blind])]
        )
    if plain and not found:
        sentences.append("No control was asked (control_limit=0): whether it looks was not measured.")
    return sentences + [each.sentence() for each in parroting if each.verdict == 1][:1]


# ---- tables and charts ---------------------------------------------------------------------------


def _row(setting: dict[str, Any], metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """A line of the table of scores; a cell is None where a metric has no value."""
    cells = []
    for metric in metrics:
        found = setting["metrics"].get(metric["name"])
        if found is None:
            cells.append(None)
            continue
        low, high = (metric["scale"] * bound for bound in found["interval"])
        spread = None if found["spread"] is None else metric["scale"] * found["spread"]
        cells.append({"value": metric["scale"] * found["value"], "low": low, "high": high, "spread": spread})
    gloss = CONTROLS[setting["control"]] if setting["control"] else SOURCES[setting["source"]]
    return {**setting, "cells": cells, "gloss": gloss if setting["shots"] and not setting["control"] else ""}


def _curve(evaluation: Evaluation, others: list[published.Published]) -> Any:
    """None where there is one point alone, and nothing beside it."""
    from flamingo.eval.results.charts import Point, shot_curve

    first = evaluation.figures["metrics"][0]
    scale, points = first["scale"], []
    for setting in sorted(evaluation.figures["settings"], key=lambda s: s["shots"]):
        found = setting["metrics"].get(first["name"])
        if found and not setting["control"]:
            low, high = (scale * bound for bound in found["interval"])
            points.append(Point(setting["shots"], scale * found["value"], low, high))
    return shot_curve(points, first["title"], others) if points and (others or len(points) > 1) else None


def _kinds(evaluation: Evaluation) -> dict[str, Any] | None:
    """Kinds of queries with their scores in all settings, those of most queries first."""
    first = evaluation.figures["metrics"][0]
    by_setting = {
        setting["name"]: setting["metrics"][first["name"]]["by_kind"]
        for setting in evaluation.figures["settings"]
        if first["name"] in setting["metrics"]
    }
    most = {}
    for kinds in by_setting.values():
        for kind, found in kinds.items():
            most[kind] = max(most.get(kind, 0), found["n"])
    names = sorted(most, key=lambda kind: (-most[kind], kind))
    if len(names) < 2:
        return None
    rows = []
    for kind in names[:KINDS]:
        values = [kinds.get(kind, {}).get("value") for kinds in by_setting.values()]
        cells = [None if value is None else first["scale"] * value for value in values]
        rows.append({"name": kind, "n": most[kind], "cells": cells})
    return {"settings": list(by_setting), "rows": rows, "left_out": len(names) - len(rows)}


def _settings(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Everything that decides the figures, as text."""
    config = evaluation.config.model_dump(mode="json")
    lines = [
        ("Model", str(evaluation.figures.get("model", ""))),
        ("Its fingerprint", evaluation.figures["fingerprint"]),
    ]
    lines += [("Benchmark", config["benchmark"]), ("Split", evaluation.figures["split"])]
    lines += [(label, _text(config[name])) for name, label in SETTINGS.items()]
    versions = evaluation.figures.get("versions") or {}
    return lines + [(name, version or "not installed") for name, version in versions.items()]


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

"""The report of `benchmarks.compare`: figures, sentences that follow from them, a page and a table."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flamingo.eval import charts, compare, findings, page
from flamingo.eval.charts import Curve
from flamingo.runtime import cores

NAME = "compare-fusions"
GOAL = 0.95  # of easy-VQA's questions, which the quickstart's budget should reach
# Title, key of a way's figures, and how it is written; None where it was not measured.
ROWS: list[tuple[str, str, str]] = [
    ("right, 0 shots", "accuracy", "percent"),
    ("right, images blanked", "accuracy_image_blank", "percent"),
    ("right, 4 shots", "accuracy_4shot", "percent"),
    ("right, 4 shots without images", "accuracy_text_only_shots", "percent"),
    ("right, 4 shots, images mixed up", "accuracy_shuffled_shots", "percent"),
    ("tokens of an image in the LM", "image_tokens", "count"),
    ("numbers kept of an image", "image_values", "count"),
    ("trained parameters", "trained_parameters", "count"),
    ("samples per second in training", "samples_per_second", "rate"),
    ("seconds of a training step", "step_seconds", "short"),
    ("peak memory of a process in training, GB", "memory_gb", "short"),
]


def write(
    out: Path,
    runs: Sequence[tuple[str, Path]],
    times: Mapping[str, Mapping[str, Any]],
    rates: Mapping[str, Mapping[str, Any]],
    whole: int,
) -> Path:
    """Writes compare-fusions.html, .json and .md; the page's path.

    runs: (name, folder) of each way, the first of which the others are compared with; times: of
    `compare_times.measure`, rates: of `compare_rates.measure`; whole: steps of the quickstart. Raises
    ValueError for a run without figures.
    """
    read = [compare.read_run(folder, name) for name, folder in runs]
    ways = [figures(run, times[run.name], rates[run.name]) for run in read]
    found = {
        "machine": machine(),
        "ways": ways,
        "sentences": sentences(ways, whole),
        "settings": compare.differences(read),
    }
    (out / f"{NAME}.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    (out / f"{NAME}.md").write_text(markdown(found))
    (out / f"{NAME}.html").write_text(html(read, found), encoding="utf-8")
    return out / f"{NAME}.html"


def machine() -> str:
    """Where it was measured."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{cores()} cores, {platform.machine()}"


def figures(run: compare.Run, times: Mapping[str, Any], rates: Mapping[str, Any]) -> dict[str, Any]:
    """All of one way; None stands for what was not measured."""
    found = compare.figures(run)
    keys = ["steps", "final_loss", "final_loss_blank", "worth", "intervals", "questions", "blind_accuracy"]
    keys += [key for _, key, _ in ROWS if key in found]
    return {
        "name": run.name,
        **{key: found[key] for key in keys},
        **rates,
        "image_tokens": times["image_tokens"],
        "image_values": times["image_values"],
        "shots": dict(times["shots"]),
    }


# ---- sentences -----------------------------------------------------------------------------------


def sentences(ways: Sequence[Mapping[str, Any]], whole: int) -> list[str]:
    """What the figures say, each sentence from figures that are there."""
    said: list[str] = []
    if (steps := ways[0]["steps"]) < whole:
        said.append(
            f"Trained for {steps:,} of the quickstart's {whole:,} steps: accuracies and losses "
            "are those of an unfinished training."
        )
    said += _answers(ways)
    said += [sentence for way in ways if (sentence := _looks(way))]
    said += _growth(ways)
    said += _training(ways)
    return said


def _answers(ways: Sequence[Mapping[str, Any]]) -> list[str]:
    """Who answers more, as far as intervals tell, and who reaches the goal."""
    asked = [way for way in ways if way["accuracy"] is not None]
    if not asked:
        return ["No test question was asked."]
    best = max(asked, key=lambda way: way["accuracy"])
    said = f"{best['name']} answers most test questions right: {findings.percent(best['accuracy'])}"
    intervals = {way["name"]: way["intervals"]["accuracy"] for way in asked}
    others = [way for way in asked if way is not best]
    near = [w for w in others if not findings.compare(intervals[best["name"]], intervals[w["name"]])]
    below = [w for w in others if w not in near]
    parts = [said]
    if near:
        parts.append(f"{_listed(near)} no fewer that is more than chance")
    if below:
        parts.append(f"{_listed(below)} fewer")
    sentences = ["; ".join(parts) + "."]
    blind = best["blind_accuracy"]
    if blind is not None and findings.compare(intervals[best["name"]], [blind, blind]) <= 0:
        sentences.append(f"None answers more than the {findings.percent(blind)} possible without looking.")
    missed = [way for way in asked if way["accuracy"] < GOAL]
    if missed:
        sentences.append(f"Below {findings.percent(GOAL)} in this budget: {_listed(missed)}.")
    return sentences


def _listed(ways: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{way['name']} ({findings.percent(way['accuracy'])})" for way in ways)


def _looks(way: Mapping[str, Any]) -> str | None:
    """Whether its answers come from the pictures."""
    seen, blank = (way["intervals"].get(key) for key in ("accuracy", "accuracy_image_blank"))
    if not seen or not blank:
        return None
    points = 100 * (way["accuracy"] - way["accuracy_image_blank"])
    if findings.compare(seen, blank) > 0:
        return f"{way['name']} looks: blank pictures cost it {points:.1f} points."
    return f"{way['name']} does not look as far as this tells: blank pictures cost it {points:.1f} points."


def _growth(ways: Sequence[Mapping[str, Any]]) -> list[str]:
    """What shots cost each of them."""
    numbers = sorted(map(int, ways[0]["shots"]))
    few, many = str(numbers[0]), str(numbers[-1])
    said = [
        "In the language model an image is "
        + ", ".join(
            f"{w['image_tokens']} token{'s' * (w['image_tokens'] > 1)} with {w['name']}" for w in ways
        )
        + "."
    ]
    if few == many:
        return said
    grown = [(w, w["shots"][many]["seconds"] / w["shots"][few]["seconds"]) for w in ways]
    said.append(
        f"From {few} to {many} shots an answer takes "
        + ", ".join(f"{times:.1f} times as long with {way['name']}" for way, times in grown)
        + f"; its prompt has {_prompts(ways, many)} tokens."
    )
    for way in ways[1:]:
        held = way["shots"][many]
        said.append(
            f"At {many} shots {way['name']} takes {held['ratio']:.2f} times as long as {ways[0]['name']} "
            f"({_span(held['ratio_range'])})."
        )
    return said


def _prompts(ways: Sequence[Mapping[str, Any]], shots: str) -> str:
    return ", ".join(f"{way['shots'][shots]['tokens']:,.0f}" for way in ways)


def _span(values: Sequence[float]) -> str:
    return f"{values[0]:.2f} to {values[1]:.2f} in the rounds"


def _training(ways: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the others train, and how fast, beside the first."""
    first, said = ways[0], []
    for way in ways[1:]:
        parts = []
        if way["trained_parameters"] and first["trained_parameters"]:
            share = way["trained_parameters"] / first["trained_parameters"]
            parts.append(f"trains {findings.percent(share)} as many parameters")
        span = _span(way["rate_ratio_range"])
        parts.append(f"learns from {way['rate_ratio']:.2f} times as many samples a second ({span})")
        if way["memory_gb"] and first["memory_gb"]:
            parts.append(f"needs {way['memory_gb'] / first['memory_gb']:.2f} times the memory")
        if parts:
            said.append(f"Beside {first['name']}, {way['name']} " + ", ".join(parts) + ".")
    return said


# ---- table and page ------------------------------------------------------------------------------


def rows(ways: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """(title, a text for each way); what nobody has is left out."""
    filters = page.environment().filters
    table = []
    for title, key, how in ROWS:
        values = [way.get(key) for way in ways]
        if any(value is not None for value in values):
            texts = ["-" if value is None else str(filters[how](value)) for value in values]  # type: ignore[operator]
            table.append((title, texts))
    for shots in sorted(map(int, ways[0]["shots"])):
        held = [way["shots"][str(shots)] for way in ways]
        table.append((f"tokens of a prompt, {shots} shots", [f"{one['tokens']:,.0f}" for one in held]))
        texts = [f"{one['seconds']:.3g} s ({one['ratio']:.2f} times)" for one in held]
        table.append((f"time of an answer, {shots} shots", texts))
    return table


def markdown(found: Mapping[str, Any]) -> str:
    """A table for documents, and the sentences below it."""
    ways = found["ways"]
    lines = ["| | " + " | ".join(way["name"] for way in ways) + " |", "|---" * (len(ways) + 1) + "|"]
    lines += [f"| {title} | " + " | ".join(texts) + " |" for title, texts in rows(ways)]
    text = "\n".join(lines) + f"\n\nMeasured on {found['machine']}.\n\n"
    return (text + "\n".join(f"- {sentence}" for sentence in found["sentences"]) + "\n").replace(
        "\u00a0", " "
    )


def html(runs: Sequence[compare.Run], found: Mapping[str, Any]) -> str:
    """The page; all text from files is escaped."""
    ways = found["ways"]
    numbers = sorted(map(int, ways[0]["shots"]))
    costs = [
        (
            title,
            charts.compared(
                [_curve(way, n, key, numbers) for n, way in enumerate(ways)], title, over="shots"
            ),
        )
        for title, key in (("Seconds of an answer", "seconds"), ("Tokens of a prompt", "tokens"))
    ]
    view = {
        "ways": list(zip(compare.LETTERS, [way["name"] for way in ways], strict=False)),
        "rows": rows(ways),
        "losses": compare.loss_charts(runs),
        "costs": costs,
        **{key: found[key] for key in ("machine", "sentences", "settings")},
    }
    template = Path(__file__).with_name(f"{NAME}.html.jinja").read_text(encoding="utf-8")
    return page.environment().from_string(template).render(view)


def _curve(way: Mapping[str, Any], number: int, key: str, shots: Sequence[int]) -> Curve:
    values = [float(way["shots"][str(n)][key]) for n in shots]
    return Curve(([float(n) for n in shots], values), number, compare.LETTERS[number])

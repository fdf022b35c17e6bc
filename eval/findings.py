"""What a run's figures say, in sentences: careful with small differences, plain about bad ones.

Two shares differ when their 95 % intervals lie apart: stricter than a test of the difference, so
that no sentence claims what the next seed takes back. Takes report.json's figures.
"""

from __future__ import annotations

from typing import Any

LITTLE = 0.05  # of the loss with blanked pictures: a smaller distance is called none
Interval = list[float]


def percent(share: float) -> str:
    """0.9717 -> 97.2 %; only all is 100 %, and only nothing 0: 0.99979 -> 99.98 %"""
    digits = 1
    while share not in (0, 1) and f"{100 * share:.{digits}f}" in (f"{100:.{digits}f}", f"{0:.{digits}f}"):
        digits += 1
    return f"{100 * share:.{digits}f}\u00a0%"


def short(value: float) -> str:
    """Two decimals, more for what would be lost."""
    return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.2g}"


def duration(seconds: float) -> str:
    """933.2 -> 15 min 33 s"""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def compare(one: Interval, other: Interval) -> int:
    """1 or -1 when `one` lies wholly above or below `other`, else 0."""
    return int(one[0] > other[1]) - int(one[1] < other[0])


def headline(report: dict[str, Any]) -> str:
    """One sentence: test accuracy beside what needs no eyes."""
    share, blind = report["accuracy"], report["blind_accuracy"]
    blank, intervals = report["accuracy_image_blank"], report["intervals"]
    if share is None:
        return "Not evaluated: how many test questions it answers was not measured."
    parts = [f"Answers {percent(share)} of {report['questions']['accuracy']:,} test questions"]
    if blind is not None:
        parts[0] += {
            1: f"; {percent(blind)} is possible without looking",
            0: f", no better than the {percent(blind)} possible without looking",
            -1: f", worse than the {percent(blind)} possible without looking",
        }[compare(intervals["accuracy"], [blind, blind])]
    if blank is not None:
        parts.append(
            {
                1: f"with blanked images it falls to {percent(blank)}",
                0: f"with blanked images it answers as many ({percent(blank)})",
                -1: f"with blanked images it even rises to {percent(blank)}",
            }[compare(intervals["accuracy"], intervals["accuracy_image_blank"])]
        )
    return "; ".join(parts) + "."


def reading(report: dict[str, Any]) -> list[str]:
    """What follows from the figures: the judgement first, then what supports it."""
    return [judgement(report), *_losses(report), *_shots(report)]


def judgement(report: dict[str, Any]) -> str:
    """Whether the answers come from the pictures."""
    intervals, blind = report["intervals"], report["blind_accuracy"]
    gaps = list(_gaps(report).values())
    seen, blank = intervals["accuracy"], intervals["accuracy_image_blank"]
    looks = None if seen is None or blank is None else compare(seen, blank) > 0
    above = None if seen is None or blind is None else compare(seen, [blind, blind]) > 0
    if looks:
        points = f"{100 * (report['accuracy'] - report['accuracy_image_blank']):.1f} points"
        if above is False:
            return (
                f"It sees something: blanking the images costs {points}. But what it sees does not "
                "lift it above a model that guesses well and never looks."
            )
        return f"The answers depend on the pictures: blanking them costs {points}."
    if looks is False:
        if above:
            return (
                "Unclear: it is above what is possible without looking, yet blanking the images "
                "costs nothing measurable. One of the two figures deserves distrust."
            )
        if gaps and max(gaps) >= LITTLE:
            return (
                "Its answers do not depend on the pictures, although its losses do: blanking the "
                "images costs no measurable accuracy."
            )
        return "It does not look: blanking the images costs nothing measurable."
    if above:
        return (
            "It answers more than is possible without looking; the control with blanked images, "
            "which would show it directly, was not measured."
        )
    if above is False:
        return "Nothing shows that it looks: a model that never looks answers as many."
    if not gaps:
        return "Whether it looks at the pictures was not measured."
    if max(gaps) >= LITTLE:
        return "The losses say that it looks; no test question says whether that helps."
    return "The losses say that it does not look: with blanked images they are hardly higher."


def _gaps(report: dict[str, Any]) -> dict[str, float]:
    """Source -> the share of its blanked loss that the pictures take away."""
    beside = report["final_loss_beside_blank"]
    blanked = report["final_loss_blank"].items()
    return {name: (loss - beside[name]) / max(loss, 1e-9) for name, loss in blanked}


def _losses(report: dict[str, Any]) -> list[str]:
    blank, beside = report["final_loss_blank"], report["final_loss_beside_blank"]
    if not blank:
        return ["The losses with blanked images were not measured."]
    gaps = _gaps(report)
    raised = [
        f"of {name} from {short(beside[name])} to {short(blank[name])}"
        for name, gap in gaps.items()
        if gap >= LITTLE
    ]
    alike = [
        f"of {name} ({short(beside[name])}, blanked {short(blank[name])})"
        for name, gap in gaps.items()
        if gap < LITTLE
    ]
    sentences = []
    if raised:
        said = " and ".join(raised)
        sentences.append(f"In training, blanking the images raises the loss {said}.")
    if alike:
        said = " and ".join(alike)
        sentences.append(
            f"In training, blanking the images does not raise the loss {said} by more than "
            f"{100 * LITTLE:.0f}\u00a0%: there it does not look."
        )
    return sentences


def _shots(report: dict[str, Any]) -> list[str]:
    """What four demonstrations change, and whether their pictures do."""
    intervals = report["intervals"]
    zero, four, text = (intervals[key] for key in ("accuracy", "accuracy_4shot", "accuracy_text_only_shots"))
    sentences = []
    if zero and four:
        now = percent(report["accuracy_4shot"])
        sentences.append(
            {
                1: f"Four demonstrations before the question help: {now}.",
                0: f"Four demonstrations before the question change nothing measurable ({now}).",
                -1: f"Four demonstrations before the question hurt: {now}.",
            }[compare(four, zero)]
        )
    if four and text:
        now = percent(report["accuracy_text_only_shots"])
        sentences.append(
            {
                1: f"Their pictures matter: without them, {now}.",
                0: f"Their pictures change nothing measurable: without them, {now}.",
                -1: f"Their pictures are in the way: without them, {now}.",
            }[compare(four, text)]
        )
    if four and (shuffled := intervals["accuracy_shuffled_shots"]):
        now = percent(report["accuracy_shuffled_shots"])
        sentences.append(
            {
                1: f"Which picture goes with which answer matters: mixed up, {now}.",
                0: f"Mixing those pictures up changes nothing measurable: {now}.",
                -1: f"Mixing those pictures up even helps: {now}.",
            }[compare(four, shuffled)]
        )
    if (copied := report["copied"]["accuracy_4shot"]) is not None:
        sentences.append(f"Of its answers after four demonstrations, {percent(copied)} are one of theirs.")
    return sentences


def notes(report: dict[str, Any], last_step: int) -> list[str]:
    """What a reader must know before trusting the figures; often nothing."""
    found = []
    if report["resumed_at"]:
        found.append(
            f"The run was resumed after step {report['resumed_at']:,}: "
            "its training time is that of the steps since."
        )
    if last_step != report["steps"]:
        found.append(
            f"metrics.jsonl ends at step {last_step:,} of {report['steps']:,}: "
            "the curves and the summary may be of different states of the run."
        )
    if report["skipped"]:
        found.append(f"Damaged samples replaced by others in training: {report['skipped']:,}.")
    return found

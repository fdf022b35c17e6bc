"""The plot of scores over numbers of shots, with those of others as lines to steer by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from markupsafe import Markup
from matplotlib import ticker

from flamingo.eval.charts import MUTED, SERIES, STYLE, _axes, _label_ends, _number, _svg
from flamingo.eval.results.published import Published

SIZE, RIGHT = (8.6, 4.4), 0.66  # inches; the rest is for labels
PLAIN, RIGHT_PLAIN = (6.4, 3.2), 0.82  # without figures of others
DASHES = {"Flamingo": "-", "OpenFlamingo": (0, (4, 2.2)), "IDEFICS": (0, (1, 1.6))}


@dataclass(frozen=True)
class Point:
    """A score at a number of shots, with its interval, as shown."""

    shots: int
    value: float
    low: float
    high: float


def shot_curve(points: Sequence[Point], title: str, others: Sequence[Published] = ()) -> Markup:
    """Scores over shots, evenly spaced; intervals as bars. points: in the order of shots."""
    ticks = sorted({p.shots for p in points} | {shots for other in others for shots in other.shots})
    place = {shots: number for number, shots in enumerate(ticks)}
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(SIZE if others else PLAIN, right=RIGHT if others else RIGHT_PLAIN)
        labels = []
        for other in others:
            x = [place[shots] for shots in other.shots]
            axes.plot(x, other.values, color=MUTED, lw=1.0, alpha=0.75, linestyle=DASHES[other.family])
            labels.append((other.values[-1], other.model, MUTED))
        x, own = [place[point.shots] for point in points], SERIES[0]
        axes.vlines(x, [p.low for p in points], [p.high for p in points], color=own, lw=5, alpha=0.35)
        axes.plot(x, [p.value for p in points], color=own, linewidth=2.2, marker="o", markersize=5)
        if points[-1].shots == ticks[-1]:
            labels.append((points[-1].value, "this model", own))
        else:
            at = (x[-1], points[-1].high)
            axes.annotate("this model", at, (0, 5), textcoords="offset points", color=own, ha="center")
        axes.set_xlim(-0.15, max(len(ticks) - 0.85, 0.15))
        axes.xaxis.set_major_locator(ticker.FixedLocator(list(place.values())))
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda at, _: _shots(ticks, at)))
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(_number))
        values = [v for p in points for v in (p.low, p.high)] + [v for o in others for v in o.values]
        low, high = min(values), max(values)
        room = 0.08 * (high - low or 1.0)
        axes.set_ylim(max(0.0, low - room) if low >= 0 else low - room, high + room)
        _label_ends(axes, labels, leaders=0.04 if others else 0.0)
        return _svg(figure, f"{title} over numbers of shots")


def _shots(ticks: Sequence[int], at: float) -> str:
    number = round(at)
    if not 0 <= number < len(ticks):
        return ""
    return f"{ticks[number]} shot{'s' if ticks[number] != 1 else ''}"

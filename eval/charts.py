"""Charts as inline SVG, and where a word looked as a heat map over its picture.

Colours in the SVG are CSS variables of the page, so charts follow its light or dark scheme; text
stays text in the page's font. Knows figures and pictures, nothing of runs.

H, W = height and width in pixels; rows, columns = the grid of a vision encoder.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import PIL.Image
from markupsafe import Markup, escape
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Matplotlib draws with stand-ins, which `_svg` replaces by variables that the page defines.
INK, MUTED, RULE = "#000001", "#000002", "#000003"
SERIES = ("#000011", "#000012", "#000013", "#000014")
RUNS = (*SERIES, "#000015", "#000016", "#000017", "#000018")  # of a page that compares runs
VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule"}
VARIABLES |= {color: f"series-{number}" for number, color in enumerate(RUNS)}

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "flamingo",  # the same figures give the same bytes
    "text.parse_math": False,
    "font.size": 11,
    "axes.edgecolor": RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    **{f"{axis}tick.{key}": MUTED for axis in "xy" for key in ("color", "labelcolor")},
    **{f"{axis}tick.major.size": 0 for axis in "xy"},
    **{f"{axis}tick.minor.size": 0 for axis in "xy"},
}
LARGE, SMALL = (5.3, 3.2), (3.8, 2.4)  # width, height in inches of 72 units
POINTS = 500  # drawn per line; longer ones are averaged
Series = tuple[Sequence[float], Sequence[float]]


def losses(name: str, seen: Series, blank: Series, color: int, top: float) -> Markup:
    """One source's loss (solid) and its loss with blanked pictures (dashed), up to `top`."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(LARGE, right=0.79)
        line = SERIES[color % len(SERIES)]
        axes.plot(*_thin(seen), color=line, alpha=0.3, linewidth=0.8)
        smooth = _smooth(_thin(seen))
        axes.plot(*smooth, color=line)
        labels = [(smooth[1][-1], "with images", line)]
        if blank[0]:
            thin = _thin(blank)
            axes.plot(*thin, color=line, linestyle=(0, (4, 2.2)))
            labels.append((thin[1][-1], "blanked", line))
        axes.set_ylim(0, top * 1.04)
        _label_ends(axes, labels)
        return _svg(figure, f"Loss of {name} over the steps, with images and with blanked ones")


def gates(steps: Sequence[float], values: Sequence[Sequence[float]], title: str) -> Markup:
    """tanh of every block's gate, the deeper the darker; values: float[steps, blocks]."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(SMALL, right=0.9)
        columns = list(zip(*values, strict=True))
        labels = []
        for number, column in enumerate(columns):
            x, y = _thin((steps, column))
            depth = number / max(1, len(columns) - 1)
            axes.plot(x, y, color=SERIES[0], alpha=0.35 + 0.65 * depth, linewidth=1.2 + 0.8 * depth)
            labels.append((y[-1], str(number + 1), INK))
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, 0.0), max(high, 0.0))
        _label_ends(axes, labels)
        return _svg(figure, f"{title} of every block over the steps")


def line(series: Series, title: str, log: bool = False, level: float | None = None) -> Markup:
    """One quantity over the steps; `level` draws a dotted line across."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(SMALL, right=0.97)
        x, y = _thin(series)
        axes.plot(x, y, color=SERIES[0], linewidth=1.3)
        if level is not None:
            axes.axhline(level, color=MUTED, linestyle=":", linewidth=1.2)
        positive = [value for value in y if value > 0]
        if log and positive and max(positive) / min(positive) > 10:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(ticker.FuncFormatter(_number))
            axes.yaxis.set_minor_formatter(ticker.NullFormatter())
        else:
            axes.set_ylim(0, max([*y, level or 0, 1e-12]) * 1.08)
        return _svg(figure, f"{title} over the steps")


@dataclass(frozen=True)
class Curve:
    """One run's line in a chart of several.

    color: the run's number; label: at the line's end, "" for none; band: the lowest and highest
    beside each value; smooth: drawn as its running mean, over the pale line itself.
    """

    series: Series
    color: int
    label: str = ""
    dashed: bool = False
    smooth: bool = False
    band: tuple[Sequence[float], Sequence[float]] | None = None


def compared(
    curves: Sequence[Curve],
    title: str,
    large: bool = False,
    log: bool = False,
    top: float | None = None,
    over: str = "the steps",
) -> Markup:
    """The same quantity of several runs over the steps, or what else the series count; `top` ends the
    axis below the highest."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(LARGE if large else SMALL, right=0.94)
        labels, values = [], [0.0]
        for curve in curves:
            color = RUNS[curve.color % len(RUNS)]
            x, y = thin = _thin(curve.series)
            if curve.smooth:
                axes.plot(x, y, color=color, alpha=0.25, linewidth=0.7)
                values.append(float(np.quantile(y, 0.98)))
                y = _smooth(thin)[1]
            if curve.band:
                low, high = (_thin((curve.series[0], edge))[1] for edge in curve.band)
                axes.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
                values += [*low, *high]
            marker = "o" if len(x) == 1 else ""
            axes.plot(x, y, marker=marker, color=color, linestyle=(0, (4, 2.2)) if curve.dashed else "-")
            values += y
            if curve.label:
                labels.append((y[-1], curve.label, color))
        positive = [value for value in values if value > 0]
        if log and positive and max(positive) / min(positive) > 10:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(ticker.FuncFormatter(_number))
            axes.yaxis.set_minor_formatter(ticker.NullFormatter())
            labels = [(math.log(max(y, min(positive))), text, color) for y, text, color in labels]
            _label_ends(axes, labels, tuple(math.log(edge) for edge in axes.get_ylim()))
        else:
            highest = (top if top is not None else max(values)) or 1e-12
            axes.set_ylim(min(values) * 1.08, highest * 1.06)
            _label_ends(axes, labels)
        return _svg(figure, f"{title} over {over}")


def _axes(size: tuple[float, float], right: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size)
    left, bottom = 0.55 / size[0], 0.32 / size[1]
    axes = figure.add_axes((left, bottom, right - left, 0.96 - bottom))
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.yaxis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(_number))
    return figure, axes


def _number(value: float, _: object = None) -> str:
    """0.00025 -> 2.5e-4: axes have no room for zeros."""
    if value == 0 or abs(value) >= 0.001:
        return f"{value:,.6g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _thin(series: Series) -> tuple[list[float], list[float]]:
    """At most `POINTS` points: means of equal stretches, without what is not finite."""
    pairs = [(x, y) for x, y in zip(*series, strict=True) if math.isfinite(y)]
    if not pairs:
        return [0.0], [0.0]
    parts = np.array_split(np.array(pairs, dtype=float), min(POINTS, len(pairs)))
    return [float(p[:, 0].mean()) for p in parts], [float(p[:, 1].mean()) for p in parts]


def _smooth(series: tuple[list[float], list[float]]) -> tuple[list[float], list[float]]:
    """Mean over a twentieth of the run; less at its start, where losses fall fast, and its end."""
    x, y = series
    reaches = [min(len(y) // 40, i) for i in range(len(y))]
    return x, [float(np.mean(y[i - reach : i + reach + 1])) for i, reach in enumerate(reaches)]


def _label_ends(
    axes: Axes,
    labels: list[tuple[float, str, str]],
    limits: tuple[float, ...] | None = None,
    leaders: float = 0.0,
) -> None:
    """Texts right of the lines' ends, pushed apart where they would touch.

    limits: of the axis, where it is not even and `labels` have been made so; leaders: the width, of the
    axes', that thin lines from ends to texts have, for many labels.
    """
    if not labels:
        return
    low, high = limits or axes.get_ylim()
    labels = sorted(labels)
    gap = 14 / (axes.get_window_extent().height * 72 / axes.figure.dpi)  # of the axes' height
    places = [(y - low) / (high - low) for y, _, _ in labels]
    for _ in range(100):
        for i in range(len(places) - 1):
            push = max(0.0, gap - (places[i + 1] - places[i])) / 2
            places[i], places[i + 1] = places[i] - push, places[i + 1] + push
        places[0], places[-1] = max(places[0], 0.0), min(places[-1], 1.0)
    for place, (y, text, color) in zip(places, labels, strict=True):
        axes.text(1.02 + leaders, place, text, color=color, transform=axes.transAxes, va="center")
        if leaders:
            ends = [(y - low) / (high - low), place]
            x = [1.0, 1.01 + leaders]
            axes.plot(x, ends, color=RULE, lw=0.8, transform=axes.transAxes, clip_on=False)


def _svg(figure: Figure, description: str) -> Markup:
    """The figure for a page: no prologue, no fixed size, colours as CSS variables."""
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'<defs>\s*<style type="text/css">.*?</style>\s*</defs>', "", text, flags=re.S)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # the same ids in every chart
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", text)
    head, rest = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    for color, variable in VARIABLES.items():
        rest = rest.replace(color, f"var(--{variable})")
    label = escape(description)
    # All that is text in it went through matplotlib's own XML escaping.
    return Markup(f'<svg {box[0]} role="img" aria-label="{label}">{rest.strip()}')


SIDE = 192  # pixels of a picture's longer side in the page
HEAT = "inferno"  # rises in brightness, so that it reads without telling colours apart
ALPHA = 0.66  # of the heat over the picture, everywhere: the scale below a gallery stays true


def picture(png: str, side: int = SIDE) -> PIL.Image.Image:
    """A base64 picture, enlarged (in whole steps, so that pixels stay square) or reduced to `side`.

    Raises ValueError when it is none.
    """
    try:
        image = PIL.Image.open(io.BytesIO(base64.b64decode(png, validate=True))).convert("RGB")
    except (OSError, TypeError, binascii.Error, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"not a base64 picture: {error}") from None
    scale = side / max(image.size)
    scale = math.floor(scale) if scale >= 2 else scale
    size = [max(1, round(length * scale)) for length in image.size]
    mode = PIL.Image.Resampling.NEAREST if scale > 1 else PIL.Image.Resampling.LANCZOS
    return image.resize((size[0], size[1]), mode)


def heat_top(maps: Sequence[np.ndarray]) -> float:
    """Where the colours of all maps end, in even shares: one scale makes words comparable."""
    peaks = [float(grid.max()) * grid.size for grid in maps]
    return max(3.0, round(float(np.quantile(peaks, 0.75)))) if peaks else 3.0


def overlay(image: PIL.Image.Image, grid: np.ndarray, top: float) -> PIL.Image.Image:
    """The picture, in grey, under a smooth heat map.

    Args:
        grid: float[rows, columns], shares of attention.
        top: where the colours end, in even shares (1 / places of the grid).
    """
    shares = PIL.Image.fromarray((grid * grid.size / top).astype(np.float32))
    smooth_HW = np.asarray(shares.resize(image.size, PIL.Image.Resampling.BICUBIC)).clip(0, 1)
    # The darkest channel, because in brightness yellow on white vanishes; lifted, because a
    # black object would darken the heat.
    grey_HW = 0.3 + 0.7 * np.asarray(image).min(-1) / 255
    return PIL.Image.fromarray(_over(smooth_HW, grey_HW))


def _over(share: np.ndarray, grey: np.ndarray) -> np.ndarray:
    """uint8[..., 3]: heat colours of shares in 0..1 over grey in 0..1."""
    heat = matplotlib.colormaps[HEAT](share)[..., :3]
    mixed = ALPHA * heat + (1 - ALPHA) * grey[..., None]
    return (mixed * 255).round().astype(np.uint8)


def heat_gradient() -> str:
    """CSS colours of the heat maps' scale, from nothing to the top, over a light picture."""
    rgb = _over(np.linspace(0, 1, 9), np.full(9, 0.9))
    return ", ".join(f"rgb({r} {g} {b})" for r, g, b in rgb)


def data_uri(image: PIL.Image.Image, kind: str = "png") -> str:
    """The picture as part of a page; kind: "png", or "jpeg" for what is smooth."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind, optimize=True, **({"quality": 90} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"

"""The gates: what tanh lets through, and how far those of the quickstart opened in training.

gates.json holds `gate_attention` and `gate_feed_forward` of every 20th line of a quickstart run's
metrics.jsonl.
"""

from __future__ import annotations

import json
from math import tanh
from pathlib import Path

from docs.drawings.resampler import quickstart_config
from docs.drawings.svg import Drawing

RUN = json.loads((Path(__file__).parent / "gates.json").read_text())
COLOURS = ("one", "two", "three")


def draw() -> Drawing:
    drawing = Drawing("gates", 740, 330)
    _curve(drawing)
    _training(drawing)
    return drawing


def _curve(drawing: Drawing) -> None:
    left, top, width, height = 44, 48, 250, 220

    def at(gate: float, let: float) -> tuple[float, float]:
        return left + width * (gate + 2) / 4, top + height * (1 - let) / 2

    drawing.text(left, 22, "what a gate lets through: tanh(gate)", bold=True)
    for let in (-1, 0, 1):
        drawing.line([at(-2, let), at(2, let)], "line", 0.8, "2 3" if let else "")
        drawing.text(left - 8, at(0, let)[1] + 4, str(let), "soft", "end", 12)
    for gate in (-2, -1, 0, 1, 2):
        drawing.text(at(gate, -1)[0], top + height + 20, str(gate), "soft", "middle", 12)
    drawing.text(left + width / 2, top + height + 40, "the gate's number", "soft", "middle", 12)
    drawing.line([at(step / 20, tanh(step / 20)) for step in range(-40, 41)], "one", 2.4)
    init = quickstart_config().gate_init
    begun = (f"{init}, the quickstart:", f"{tanh(init):.2f}")
    marks = [(0.0, ("0, the paper:", "the untouched LM"), 22), (init, begun, 2)]
    for gate, lines, below in marks:
        x, y = at(gate, tanh(gate))
        drawing.dot(x, y, "ink")
        for place, line in enumerate(lines):
            drawing.text(x + 10, y + below + 15 * place, line, size=12)


def _training(drawing: Drawing) -> None:
    left, top, width, height = 404, 48, 260, 220
    low, high = 0.42, 0.48
    steps, layers = RUN["step"], quickstart_config().block_positions

    def at(step: float, value: float) -> tuple[float, float]:
        return left + width * step / steps[-1], top + height * (high - value) / (high - low)

    drawing.text(left - 40, 22, "the quickstart's gates while it trains", bold=True)
    for value in (0.42, 0.44, 0.46, 0.48):
        drawing.line([at(0, value), at(steps[-1], value)], "line", 0.8, "2 3")
        drawing.text(left - 8, at(0, value)[1] + 4, f"{value:.2f}", "soft", "end", 12)
    for step in (0, 180, 360, 540):
        drawing.text(at(step, low)[0], top + height + 20, str(step), "soft", "middle", 12)
    drawing.text(left + width / 2, top + height + 40, "step (solid: attention, dashed: feed-forward)", "soft",
                 "middle", 12)  # fmt: skip
    for name, dashes in (("gate_feed_forward", "4 3"), ("gate_attention", "")):
        for block in range(len(layers)):
            values = [gates[block] for gates in RUN[name]]
            points = [at(step, value) for step, value in zip(steps, values, strict=True)]
            colour = "line" if dashes else COLOURS[block % 3]
            drawing.line(points, colour, 1.2 if dashes else 2, dashes)
    ends = sorted((at(0, RUN["gate_attention"][-1][b])[1], b) for b in range(len(layers)))
    above = -99.0
    for y, block in ends:
        above = max(y + 4, above + 13)
        drawing.text(left + width + 8, above, f"layer {layers[block]}", COLOURS[block % 3], size=11.5)

"""What the drawings of docs/concepts.md are made of: a little SVG that follows light and dark mode."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

Point = tuple[float, float]

LIGHT = {
    "ink": "#1c2024", "soft": "#5c6570", "line": "#aab2bd", "cell": "#eceff3",
    "frozen": "#e3eaf4", "frozen-edge": "#8fa3bf", "trained": "#fbd5df", "trained-edge": "#d1466f",
    "one": "#d1466f", "two": "#2f74c0", "three": "#2e9e6b", "on": "#ffffff",
}  # fmt: skip
DARK = {
    "ink": "#e8eaed", "soft": "#a6afba", "line": "#69727e", "cell": "#2a2f36",
    "frozen": "#253247", "frozen-edge": "#7189ac", "trained": "#4d1f30", "trained-edge": "#f07a9b",
    "one": "#f07a9b", "two": "#6fb1f5", "three": "#5fd09c", "on": "#14171a",
}  # fmt: skip
IMAGES = ("one", "two", "three")  # colours of the first, second and third picture


def _variables(colours: dict[str, str]) -> str:
    return "".join(f"--{name}:{colour};" for name, colour in colours.items())


# In a page the switch of the theme decides, in a file by itself the system.
STYLE = (
    f"svg.drawing{{{_variables(LIGHT)}font-family:system-ui,sans-serif;font-size:13px}}"
    f"@media(prefers-color-scheme:dark){{svg.drawing{{{_variables(DARK)}}}}}"
    f'body[data-theme="light"] svg.drawing{{{_variables(LIGHT)}}}'
    f'body[data-theme="dark"] svg.drawing{{{_variables(DARK)}}}'
)


def number(x: float) -> str:
    """With one digit at most: the same on every machine."""
    return f"{round(x, 1):g}"


class Drawing:
    """Pieces in the order in which they are drawn. Colours are names of `LIGHT`."""

    def __init__(self, name: str, width: float, height: float) -> None:
        self.name, self.width, self.height = name, width, height
        self.pieces: list[str] = []

    def box(
        self, x: float, y: float, width: float, height: float, fill: str, edge: str = "", round_: float = 3
    ) -> None:
        line = f" stroke='var(--{edge})' stroke-width='1.2'" if edge else ""
        place = f"x='{number(x)}' y='{number(y)}' width='{number(width)}' height='{number(height)}'"
        self.pieces.append(f"<rect {place} rx='{number(round_)}' fill='var(--{fill})'{line}/>")

    def text(
        self, x: float, y: float, text: str, colour: str = "ink", anchor: str = "start", size: float = 13,
        bold: bool = False,
    ) -> None:  # fmt: skip
        weight = " font-weight='600'" if bold else ""
        place = f"x='{number(x)}' y='{number(y)}' text-anchor='{anchor}' font-size='{number(size)}'"
        self.pieces.append(f"<text {place}{weight} fill='var(--{colour})'>{escape(text, quote=False)}</text>")

    def line(
        self, points: Sequence[Point], colour: str = "line", width: float = 1.4, dashes: str = "",
        arrow: bool = False,
    ) -> None:  # fmt: skip
        path = "M" + "L".join(f"{number(x)} {number(y)}" for x, y in points)
        more = f" stroke-dasharray='{dashes}'" if dashes else ""
        self.pieces.append(
            f"<path d='{path}' fill='none' stroke='var(--{colour})' stroke-width='{number(width)}'{more}/>"
        )
        if arrow:
            self._head(points[-2], points[-1], colour)

    def dot(self, x: float, y: float, colour: str, radius: float = 4) -> None:
        self.pieces.append(
            f"<circle cx='{number(x)}' cy='{number(y)}' r='{number(radius)}' fill='var(--{colour})'/>"
        )

    def labelled(
        self, x: float, y: float, width: float, height: float, lines: Iterable[str], trained: bool
    ) -> None:
        """A part of the model: pink is trained, blue is frozen. The first line is its name."""
        kind, lines = "trained" if trained else "frozen", list(lines)
        self.box(x, y, width, height, kind, f"{kind}-edge", 6)
        top = y + height / 2 - 8 * (len(lines) - 1) + 4.5
        for place, line in enumerate(lines):
            first = place == 0
            self.text(
                x + width / 2, top + 16 * place, line, "ink" if first else "soft", "middle",
                13 if first else 11.5, first,
            )  # fmt: skip

    def _head(self, before: Point, tip: Point, colour: str) -> None:
        (x0, y0), (x, y) = before, tip
        length = ((x - x0) ** 2 + (y - y0) ** 2) ** 0.5
        dx, dy = (x - x0) / length, (y - y0) / length
        sides = [(x - 7 * dx + s * 4 * dy, y - 7 * dy - s * 4 * dx) for s in (1, -1)]
        points = " ".join(f"{number(a)},{number(b)}" for a, b in [(x, y), *sides])
        self.pieces.append(f"<polygon points='{points}' fill='var(--{colour})'/>")

    def svg(self) -> str:
        size = f"viewBox='0 0 {number(self.width)} {number(self.height)}'"
        head = f"<svg xmlns='http://www.w3.org/2000/svg' class='drawing' {size}>"
        return "\n".join([head, f"<style>{STYLE}</style>", *self.pieces, "</svg>\n"])

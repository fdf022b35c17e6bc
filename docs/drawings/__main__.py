"""`python -m docs.drawings` draws the pictures of docs/concepts.md anew, into docs/images/drawings."""

from __future__ import annotations

from pathlib import Path

from docs.drawings import gates, model, resampler, sight

FOLDER = Path(__file__).parents[1] / "images" / "drawings"


def drawings() -> dict[str, str]:
    """File name -> SVG, of all drawings."""
    return {f"{d.name}.svg": d.svg() for d in (module.draw() for module in (model, sight, resampler, gates))}


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, svg in drawings().items():
        (FOLDER / name).write_text(svg, encoding="utf-8")

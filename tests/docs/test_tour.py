"""The tour runs from its first block to its last, as printed, on a model of a few layers."""

from __future__ import annotations

from pathlib import Path

from tests.docs.pages import ROOT, blocks
from tests.docs.test_tutorials import WalkPage, made, walk

__all__ = ["made", "walk"]  # fixtures


def test_the_tour_is_walked(walk: WalkPage, tmp_path: Path):  # noqa: F811
    page = ROOT / "docs" / "tour.md"
    answers = {"red", "rectangle", "blue"}  # what only the trained model says
    said = {line for b in blocks(page.read_text()) if b.language == "text" for line in b.code.splitlines()}
    assert answers < said
    answers |= {line for line in said if line.startswith("blue ")}
    walk("../tour.md", {"make quickstart": "true"}, answers)
    assert (tmp_path / "looked.png").is_file()

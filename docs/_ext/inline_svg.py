"""Drawings stand in the page itself: so they follow the page's light or dark mode, not the system's alone."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from docutils import nodes

FOLDER = "images/drawings/"


def _inline(app: Any, doctree: nodes.document, docname: str) -> None:
    if app.builder.format != "html":
        return
    for image in list(doctree.findall(nodes.image)):
        if not image["uri"].startswith(FOLDER):
            continue
        svg = (Path(app.srcdir) / image["uri"]).read_text(encoding="utf-8")
        label = html.escape(image.get("alt", ""))
        box = f'<div class="drawing-box" role="img" aria-label="{label}">{svg}</div>'
        raw = nodes.raw("", box, format="html")
        image.parent.replace(image, raw)


def setup(app: Any) -> dict[str, Any]:
    app.connect("doctree-resolved", _inline)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""The tour runs from its first block to its last, as printed, on a model of a few layers."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

from tests.docs.pages import ROOT, blocks
from tests.docs.test_tutorials import WalkPage, made, walk

__all__ = ["made", "walk"]  # fixtures

PAGE = ROOT / "docs" / "tour.md"

# Starts the demo as the page says, at a free port, and ends it once the page has come.
VISIT = """
import socket, subprocess, sys, time, urllib.error, urllib.request

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
demo = subprocess.Popen([*sys.argv[1:], "--port", str(port)])
try:
    for _ in range(600):
        assert demo.poll() is None, "the demo ended"
        try:
            page = urllib.request.urlopen(f"http://127.0.0.1:{port}").read()
            break
        except urllib.error.URLError:
            time.sleep(0.2)
    assert b"gradio" in page
finally:
    demo.terminate()
    demo.wait(30)
"""


def test_the_tour_is_walked(walk: WalkPage, tmp_path: Path):  # noqa: F811
    (tmp_path / "visit.py").write_text(VISIT)
    said = {line for b in blocks(PAGE.read_text()) if b.language == "text" for line in b.code.splitlines()}
    answers = {line for line in said if re.search(r"^(red|rectangle|blue)\b|\"blue\"", line)}
    assert len(answers) == 5  # what only the trained model says
    demo = "flamingo demo runs/quickstart/model"
    visited = shlex.join([sys.executable, "visit.py", *demo.split()])
    walk("../tour.md", {"make quickstart": "true", demo: visited}, answers)
    assert (tmp_path / "looked.png").is_file()
    assert '"answer"' in (tmp_path / "answers.jsonl").read_text()

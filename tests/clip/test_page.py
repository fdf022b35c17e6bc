"""The commands of docs/clip.md run as they stand, on a tiny random model, and say what the page shows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from flamingo.eval.metrics import _clip
from tests.clip.conftest import write_encoder
from tests.docs.pages import Walk
from tests.docs.test_pages import code, commands, misfit

PAGE = Path(__file__).parents[2] / "docs" / "clip.md"
TEXT = PAGE.read_text()
ENCODER = "open_clip:ViT-B-32/openai"


@pytest.fixture
def folder(photos: Path, shards: str, evaluated: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the page says that the reader has."""
    pytest.importorskip("pymilvus")
    here = photos.parent
    write_encoder(here / "encoder")
    (here / "captions.txt").write_text("a red circle\na blue square\n")
    (line,) = re.findall(r"`(\{\"image\".*?\})`", TEXT)
    (here / "captions.jsonl").write_text(f"{line}\n")
    assert evaluated == here / "results"
    return here


def test_the_page_is_walked(folder: Path, monkeypatch: pytest.MonkeyPatch):
    page = folder / "clip.md"
    page.write_text(TEXT[: TEXT.index("## Train your own")])
    Walk(page, folder, monkeypatch, {ENCODER: f"open_clip:{folder / 'encoder'}"}).run()
    scores = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    assert len(scores) == 12 and {"clip_score", "ref_clip_score"} <= set(scores[0])


def test_commands_options_and_names_exist():
    wrong = {" ".join(words): said for words in commands(PAGE) if (said := misfit(words))}
    assert not wrong
    assert {"embed", "search", "classify", "score"} <= {words[1] for words in commands(PAGE) if words[1:]}
    assert f"`{ENCODER}` (default)" in TEXT and _clip.ENCODER == ENCODER
    assert {_clip.NAMED_BY, "FLAMINGO_CACHE", "FLAMINGO_MILVUS_TOKEN", "clip_score"} <= set(code(TEXT))

"""The snippets of docs/extending.md run as a reader would run them."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch

from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.train.flops import step_flops
from flamingo.train.gauges import gates

TEXT = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()


@pytest.fixture
def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", TEXT, re.S)


@pytest.fixture
def lab(snippets: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The two files of the page, on the Python path."""
    (tmp_path / "lab").mkdir()
    for name in re.findall(r"`lab/(\w+)\.py`", TEXT):
        mark = {"strips": "class Strips", "even": "class Fusion"}[name]
        (code,) = (snippet for snippet in snippets if mark in snippet)
        (tmp_path / "lab" / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    return tmp_path


def test_the_snippets_run_and_the_language_model_of_ones_own_learns_to_see(snippets: list[str]):
    names: dict = {}
    for code in snippets[:2]:
        exec(code, names)  # noqa: S102 - our own documentation
    model = names["model"]
    assert isinstance(model, FlamingoForConditionalGeneration)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_connector_and_a_fusion_of_ones_own_are_settings_like_any_other(
    snippets: list[str], lab: Path, tmp_path: Path
):
    names: dict = {}
    for code in (*snippets[:2], snippets[-1]):
        exec(code, names)  # noqa: S102 - our own documentation
    model, ids = names["model"].eval(), names["ids"]
    assert model.config.connector == "lab.strips" and model.image_tokens == 2  # rows of a 2 x 2 grid
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    pixels = torch.randn(1, 3, 64, 64)
    vectors = model.media(pixel_values=pixels).flat
    torch.testing.assert_close(vectors.square().mean(-1), torch.ones(2), atol=0.05, rtol=0)
    places = model.resampler.attention_map(torch.zeros(3, 4, 8))
    assert places.tolist() == [[[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]] * 3
    assert step_flops(model, tokens=4, targets=3, images=1) > 0 and gates(model.gated_blocks) == {}
    model.save_pretrained(tmp_path / "model")
    again = FlamingoForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(again(ids, pixel_values=pixels).logits, model(ids, pixel_values=pixels).logits)

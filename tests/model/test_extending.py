"""The snippets of docs/extending.md run as a reader would run them."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import torch

from flamingo.config import FlamingoConfig
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.vision import source

TEXT = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()


def test_the_snippets_run_and_the_language_model_of_ones_own_learns_to_see(monkeypatch, tmp_path):
    encoder, language, use = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    package, module = types.ModuleType("my"), types.ModuleType("my.encoder")
    monkeypatch.setitem(sys.modules, "my", package)
    monkeypatch.setitem(sys.modules, "my.encoder", module)
    exec(encoder, module.__dict__)  # noqa: S102 - our own documentation
    names = {"torch": torch}
    exec(language, names)  # noqa: S102
    exec(use, names)  # noqa: S102
    model = names["model"]
    assert isinstance(model, FlamingoForConditionalGeneration)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    # The encoder of the first snippet, in a model of its own.
    fields = model.config.to_dict()
    vision = source("my.encoder").describe("weights.pt")
    own = FlamingoConfig(**{**fields, "vision_config": vision, "text_config": model.config.text_config})
    seeing = FlamingoForConditionalGeneration(own)
    torch.save(seeing.vision_encoder.state_dict(), tmp_path / "weights.pt")
    source("my.encoder").load(seeing.vision_encoder, tmp_path / "weights.pt")
    logits = seeing(input_ids=torch.tensor([[33, 5]]), pixel_values=torch.zeros(1, 3, 32, 32)).logits
    assert logits.isfinite().all()

"""The snippets of docs/extending.md run as a reader would run them."""

from __future__ import annotations

import re
from pathlib import Path

from flamingo.modeling import FlamingoForConditionalGeneration

TEXT = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()


def test_the_snippets_run_and_the_language_model_of_ones_own_learns_to_see():
    language, use = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    names: dict = {}
    exec(language, names)  # noqa: S102 - our own documentation
    exec(use, names)  # noqa: S102
    model = names["model"]
    assert isinstance(model, FlamingoForConditionalGeneration)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

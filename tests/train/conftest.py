"""A tiny Flamingo, batches made by hand, and a recipe."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import yaml

from flamingo.data.batch import Batch
from flamingo.modeling import FlamingoForConditionalGeneration
from tests.train import tiny


@pytest.fixture
def model() -> FlamingoForConditionalGeneration:
    return tiny.tiny_model()


MakeBatch = Callable[..., Batch]


@pytest.fixture(scope="session")
def make_batch() -> MakeBatch:
    return tiny.make_batch


RECIPE = {
    "run": "runs/tiny",
    "steps": 100,
    "model": {"vision": "timm:resnet18", "language": "lm", "architecture": {"gate_init": 0.5}},
    "sources": [
        {"name": "captions", "kind": "pairs", "shards": "a.tar", "batch": 4, "max_tokens": 32},
        {"name": "turns", "kind": "interleaved", "shards": "b.tar", "batch": 2, "max_tokens": 64},
    ],
}


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path

"""A model that is exported is made anew from the checkpoint: the trained one has gone by then."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.train import session
from flamingo.train.config import read_recipe
from tests.train.ranks import in_ranks


def models_at_export(path: str, run: str, evaluated: bool) -> list[int]:
    """How many models the process holds when its run is exported."""
    found: list[int] = []

    def export(run: Path, out: Path) -> None:
        found.append(sum(type(held) is FlamingoForConditionalGeneration for held in gc.get_objects()))

    overrides = [f"run={run}", "steps=2", *(["evaluate={every: 2, settings: {}}"] if evaluated else [])]

    def evaluate(*given: Any) -> dict[str, float]:
        return {"score": 1.0}

    with patch.object(session, "export_run", export):
        session.train(read_recipe(path, overrides), evaluate=evaluate if evaluated else None)
    return found


@pytest.mark.parametrize("evaluated", [False, True])
def test_the_trained_model_has_gone_before_the_export_makes_it_anew(evaluated: bool, world: Path, tmp_path):
    given = str(world / "recipe.yaml"), str(tmp_path / "run"), evaluated
    assert in_ranks(1, tmp_path / "out", models_at_export, *given) == [[0]]

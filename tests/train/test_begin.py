"""A run's folder keeps its recipe, and what it went on with otherwise."""

from __future__ import annotations

import json

import pytest

from flamingo.train.config import read_recipe
from flamingo.train.opening import CHANGES, begin
from tests.train.steps import recipe


def test_settings_that_a_run_goes_on_with_are_noted_once_each(tmp_path):
    run = tmp_path / "run"
    begin(recipe(run=str(run)))
    begin(recipe(run=str(run)), 3)
    assert not (run / CHANGES).exists()
    for step in (4, 5):
        begin(recipe(run=str(run), zero_stage=2, workers=1), step)
    begin(recipe(run=str(run), workers=1), 6)
    assert [json.loads(line) for line in (run / CHANGES).read_text().splitlines()] == [
        {"after_step": 4, "settings": {"zero_stage": 2, "workers": 1}},
        {"after_step": 6, "settings": {"zero_stage": 0}},
    ]
    assert read_recipe(run / "recipe.yaml").zero_stage == 0


def test_a_damaged_note_is_named(tmp_path):
    run = tmp_path / "run"
    begin(recipe(run=str(run)))
    (run / CHANGES).write_text("{torn\n")
    with pytest.raises(ValueError, match=r"changes.jsonl: line 1 is damaged"):
        begin(recipe(run=str(run)), 3)

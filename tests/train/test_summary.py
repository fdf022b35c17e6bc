"""What a run tells at its end."""

from __future__ import annotations

import json
from pathlib import Path

from flamingo.train.opening import write_summary
from tests.train.steps import recipe


def test_a_run_that_is_started_again_at_its_end_keeps_what_it_told(tmp_path: Path) -> None:
    run = recipe(run=str(tmp_path), steps=4)
    told = tmp_path / "train.json"
    write_summary(run, {"resumed_at": 2, "train_seconds": 60.0})
    assert json.loads(told.read_text())["train_seconds"] == 60.0
    write_summary(run, {"resumed_at": 4, "train_seconds": 0.1})
    assert json.loads(told.read_text())["train_seconds"] == 60.0
    told.unlink()
    write_summary(run, {"resumed_at": 4, "train_seconds": 0.1})
    assert json.loads(told.read_text())["resumed_at"] == 4

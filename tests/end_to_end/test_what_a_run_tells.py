"""What metrics.jsonl holds where not every step is recorded, and traces."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tests.end_to_end.test_main_job import records


@pytest.fixture(scope="module")
def shut(world: Path, cli) -> Path:
    """A run whose gates are shut and stay so: pictures cannot matter."""
    run = world / "shut"
    settings = [
        f"run={run}", "log_every=3", "steps=6", "blank_every=4", "autocast=float32", "checkpoint_every=0",
        "model.frozen_dtype=float32", "model.architecture.gate_init=0", "optimizer.lr_factors={gates: 0}",
        "optimizer.lr=0.03", "profile_steps=[2]", "sources.questions.start=2", "export=false", "trackers=[]",
    ]  # fmt: skip
    done = cli("train", world / "recipe.yaml", *settings, "--processes", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    return run


def test_steps_with_something_to_tell_are_recorded_whatever_log_every_says(shut: Path):
    found = records(shut)
    assert [record["step"] for record in found] == [1, 3, 5, 6]  # 3 and 6 are due
    assert [record["step"] for record in found if "loss_blank" in record] == [1, 5, 6]


def test_a_source_that_joins_later_is_in_no_step_before(shut: Path):
    sources = {record["step"]: set(record["loss"]) for record in records(shut)}
    both = {"captions", "questions"}
    assert sources == {1: {"captions"}, 3: both, 5: both, 6: both}
    assert [record["samples"] for record in records(shut)] == [4, 8, 8, 8]


def test_the_blanked_loss_is_of_the_weights_that_the_loss_beside_it_is_of(shut: Path):
    blanked = [record for record in records(shut) if "loss_blank" in record]
    for record in blanked:
        assert record["loss_blank"] == record["loss"]
    assert blanked[0]["loss"] != blanked[-1]["loss"]


def test_a_trace_of_a_step_is_written_by_each_rank(shut: Path):
    for rank in range(2):
        with gzip.open(shut / "profile" / f"step-000002-rank-{rank:05d}.json.gz") as file:
            events = json.load(file)["traceEvents"]
        assert any("backward" in str(event.get("name", "")).lower() for event in events)

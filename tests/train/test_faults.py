"""Bad samples are listed once, survive a resume, and stop the run when there are too many; what is
kept of them, or of steps that are not finite, is missed with a message."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flamingo.data.errors import Skipped
from flamingo.train import faults as module
from flamingo.train.faults import Faults
from flamingo.train.nonfinite import NonFinite
from flamingo.train.precision import LossScale


def bad(number: int, fault: str = "damaged image") -> Skipped:
    return Skipped(f"s/a.tar/{number}", fault, "why")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr(module, "gather_objects", lambda value: [value])


def listed(run) -> list[str]:
    return [json.loads(line)["key"] for line in (run / "skipped.jsonl").read_text().splitlines()]


def test_each_is_listed_and_counted_by_kind(tmp_path):
    faults = Faults(tmp_path, 0, limit=10, rank=0)
    assert faults.note(1, [bad(1), bad(2), bad(3, "bad json")]) == {"damaged image": 2, "bad json": 1}
    assert faults.note(2, []) == {}
    record = json.loads((tmp_path / "skipped.jsonl").read_text().splitlines()[0])
    assert record == {"step": 1, "key": "s/a.tar/1", "fault": "damaged image", "detail": "why"}


def test_too_many_different_ones_stop_with_a_list_and_a_repeated_one_counts_once(tmp_path):
    faults = Faults(tmp_path, 0, limit=2, rank=0)
    for step in range(5):
        faults.note(step + 1, [bad(1), bad(2)])
    with pytest.raises(ValueError, match=r"3 bad samples by step 6, max_bad_samples=2(.|\n)*s/a.tar/3"):
        faults.note(6, [bad(3)])


def test_a_resumed_run_drops_what_it_does_again_and_counts_the_rest(tmp_path):
    faults = Faults(tmp_path, 0, limit=2, rank=0)
    faults.note(1, [bad(1)])
    faults.note(5, [bad(2)])
    (tmp_path / "skipped.jsonl").open("a").write('{"step": 3, "ke')
    again = Faults(tmp_path, 3, limit=2, rank=0)
    assert listed(tmp_path) == ["s/a.tar/1"] and again.keys == {"s/a.tar/1"}
    again.note(5, [bad(2)])
    with pytest.raises(ValueError, match="3 bad samples"):
        again.note(6, [bad(3)])


def test_only_rank_0_writes(tmp_path):
    faults = Faults.__new__(Faults)
    faults.path, faults.limit, faults.writes, faults.keys = tmp_path / "skipped.jsonl", 5, False, set()
    faults.note(1, [bad(1)])
    assert not (tmp_path / "skipped.jsonl").exists() and faults.keys == {"s/a.tar/1"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's")
def test_a_full_disk_is_told_with_the_list_and_the_step(tmp_path):
    faults = Faults(tmp_path, 0, limit=5, rank=0)
    (tmp_path / "skipped.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"skipped.jsonl cannot be written at step 7 \(No space left.*--resume"):
        faults.note(7, [bad(1)])


@pytest.mark.parametrize("ending", ["json", "safetensors"])
def test_what_cannot_be_kept_of_a_step_that_is_not_finite_is_told_with_its_folder(tmp_path, ending):
    watch = NonFinite(tmp_path, 5, rank=0)
    (watch.folder / f"step-000003-rank-00000.{ending}").mkdir(parents=True)  # no file can be written there
    batch: Any = SimpleNamespace(keys=["a"], input_ids=torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(OSError, match=r"nonfinite cannot be written at step 3 \(.*irectory.*--resume"):
        watch.note(3, {"x": math.nan}, 1.0, {"x": math.nan}, {"x": [batch]}, LossScale(False))


def noted(run: Path, losses: list[float]) -> tuple[NonFinite, list[str]]:
    """Steps with these losses, and what was said of them."""
    said: list[str] = []
    watch = NonFinite(run, 99, 0, said.append)
    batch: Any = SimpleNamespace(keys=["a"], input_ids=torch.zeros(1, 2, dtype=torch.int64))
    for step, loss in enumerate(losses, 1):
        watch.note(step, {"x": loss}, 1.0, {"x": loss}, {"x": [batch]}, LossScale(False))
    return watch, said


def test_the_first_steps_that_are_left_out_are_told_and_in_the_end_how_many(tmp_path):
    watch, said = noted(tmp_path, [1.0, *[math.nan] * 5])
    assert said == [
        f"step {step} left out: the loss of x is not finite; {tmp_path / 'nonfinite'} has its samples"
        for step in (2, 3, 4)
    ]
    watch.end(start=0)
    assert said[3:] == ["5 of 6 steps were left out: their loss or gradient was not finite"]


def test_a_run_that_left_out_all_its_steps_fails(tmp_path):
    watch, _ = noted(tmp_path, [math.nan, math.nan])
    with pytest.raises(
        ValueError, match=r"none of the 2 steps had a finite loss .*nonfinite has the samples"
    ):
        watch.end(start=0)


def test_a_run_that_went_on_and_left_out_what_was_left_is_told_so(tmp_path):
    watch, said = noted(tmp_path, [math.nan])
    watch.end(start=7)
    assert said[1:] == ["1 of 1 steps were left out: their loss or gradient was not finite"]


def test_a_run_without_such_steps_says_nothing(tmp_path):
    for losses in ([], [1.0, 2.0]):
        watch, said = noted(tmp_path, losses)
        watch.end(start=0)
        assert not said


def test_the_samples_of_every_step_that_is_left_out_are_named_and_the_batches_of_the_first_kept(tmp_path):
    noted(tmp_path, [math.nan] * 5)
    kept = sorted(path.name for path in (tmp_path / "nonfinite").iterdir())
    assert [name for name in kept if name.endswith(".safetensors")] == [
        f"step-{step:06d}-rank-00000.safetensors" for step in (1, 2, 3)
    ]
    for step in range(1, 6):
        named = json.loads((tmp_path / "nonfinite" / f"step-{step:06d}-rank-00000.json").read_text())
        assert named == {"step": step, "keys": {"x/0": ["a"]}}

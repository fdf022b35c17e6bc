"""What a run writes down; a resumed run goes on in the same files."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from flamingo.train.metrics import Metrics, flat
from flamingo.train.trackers import TensorBoard


def record(step: int, loss: float = 1.0) -> dict:
    return {"step": step, "loss": {"captions": loss}, "lr": 1e-4, "gate_attention": [0.1, 0.2]}


def write(run, start: int, steps, loss: float = 1.0) -> None:
    metrics = Metrics(run, steps=9, start=start, writes=True)
    for step in steps:
        metrics.write(record(step, loss))
    metrics.close()


def lines(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_every_step_is_one_line_of_json(tmp_path):
    write(tmp_path, 0, [1, 2, 3])
    assert lines(tmp_path) == [record(1), record(2), record(3)]


def test_a_resumed_run_drops_the_records_of_the_steps_that_it_does_again(tmp_path):
    write(tmp_path, 0, [1, 2, 3, 4], loss=1.0)
    write(tmp_path, 2, [3, 4, 5], loss=7.0)
    assert [(r["step"], r["loss"]["captions"]) for r in lines(tmp_path)] == [
        (1, 1.0),
        (2, 1.0),
        (3, 7.0),
        (4, 7.0),
        (5, 7.0),
    ]


def test_a_line_that_a_crash_cut_off_does_not_stop_the_resumed_run(tmp_path):
    write(tmp_path, 0, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    write(tmp_path, 2, [3])
    assert [r["step"] for r in lines(tmp_path)] == [1, 2, 3]


def test_records_are_on_disk_while_the_run_goes_on(tmp_path):
    metrics = Metrics(tmp_path, steps=9, start=0, writes=True)
    metrics.write(record(1))
    assert len(lines(tmp_path)) == 1
    metrics.close()


def test_other_ranks_write_nothing(tmp_path):
    metrics = Metrics(tmp_path, steps=9, start=0, writes=False)
    metrics.write(record(1))
    metrics.say("words")
    metrics.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_has_every_number(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write(tmp_path, 0, [1, 2])
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = {"loss/captions", "lr", "gate_attention/0", "gate_attention/1"}
    assert set(events.Tags()["scalars"]) == tags
    assert [(e.step, e.value) for e in events.Scalars("loss/captions")] == [(1, 1.0), (2, 1.0)]


def test_nested_numbers_become_tags():
    nested = {"loss": {"a": 1, "b": {"c": 2.5}}, "gate": [0.0, 0.5], "on": True, "text": "x"}
    assert dict(flat(nested)) == {"loss/a": 1, "loss/b/c": 2.5, "gate/0": 0.0, "gate/1": 0.5}


def test_what_is_not_finite_is_left_out_of_the_file_and_of_trackers(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    metrics = Metrics(tmp_path, steps=9, start=0, writes=True)
    odd = {
        "loss": {"captions": math.nan},
        "grad_norm": math.inf,
        "peak_share": None,
        "gates": [0.5, math.nan],
    }
    metrics.write({"step": 1, **odd})
    metrics.write(record(2))
    metrics.close()
    first, second = lines(tmp_path)
    assert first == {"step": 1, "loss": {}, "peak_share": None, "gates": [0.5, None]}
    assert second == record(2)
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss/captions")] == [2]
    assert "grad_norm" not in events.Tags()["scalars"]


def test_trackers_are_those_that_were_chosen(tmp_path):
    metrics = Metrics(tmp_path, steps=9, start=0, writes=True, trackers=[])
    metrics.write(record(1))
    metrics.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_tracker_that_fails_ends_nothing(tmp_path, capsys, monkeypatch):
    def fail(self, scalars, step):
        raise OSError("no space left")

    monkeypatch.setattr(TensorBoard, "write", fail)
    write(tmp_path, 0, [1, 2, 3])
    assert [r["step"] for r in lines(tmp_path)] == [1, 2, 3]
    assert capsys.readouterr().out.count("tracker tensorboard failed (OSError: no space left)") == 1


def test_a_run_that_is_killed_while_it_resumes_keeps_its_past(tmp_path, monkeypatch):
    write(tmp_path, 0, [1, 2, 3])

    def killed(part, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        Metrics(tmp_path, steps=9, start=2, writes=True)
    assert [r["step"] for r in lines(tmp_path)] == [1, 2, 3]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's")
def test_a_full_disk_is_told_with_the_file_and_the_step(tmp_path):
    metrics = Metrics(tmp_path, steps=9, start=0, writes=True, trackers=[])
    metrics.file.close()
    metrics.file = open("/dev/full", "a", buffering=1)  # noqa: SIM115 - closed by the metrics
    with pytest.raises(OSError, match=r"/dev/full cannot be written at step 1 \(No space left.*--resume"):
        metrics.write(record(1))
    metrics.close()

"""What a run writes down; a resumed run goes on in the same files."""

from __future__ import annotations

import json

import pytest
import torch

from flamingo.train.metrics import Metrics, flat, gates


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


def test_gates_are_reported_as_they_act(model):
    model.gated_blocks[0].attn_gate.data.fill_(0.0)
    model.gated_blocks[1].attn_gate.data.fill_(-0.3)
    values = gates(model.gated_blocks)
    tanh = torch.tensor([-0.3, 0.7]).tanh().tolist()
    assert values["gate_attention"] == pytest.approx([0.0, tanh[0]], abs=1e-4)
    assert values["gate_feed_forward"] == pytest.approx([tanh[1]] * 2, abs=1e-4)

"""Trackers get every figure, go on where a run goes on, and never end a training."""

from __future__ import annotations

import json
import struct
import sys
import time
import types
from pathlib import Path

import pytest

from flamingo.train import trackers
from flamingo.train.trackers import Trackers

SETTINGS = {"steps": 9, "optimizer": {"lr": 1e-4}}


@pytest.fixture
def said() -> list[str]:
    return []


def write(names, run: Path, said: list[str], start: int, steps) -> None:
    run.mkdir(exist_ok=True)
    opened = Trackers(names, run, start, SETTINGS, said.append)
    for step in steps:
        opened.write({"loss/captions": 1.0 / step, "lr": 1e-4}, step)
    opened.close()


def test_tensorboard_has_every_number(tmp_path, said):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write(["tensorboard"], tmp_path, said, 0, [1, 2])
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"loss/captions", "lr"}
    assert [(e.step, e.value) for e in events.Scalars("loss/captions")] == [(1, 1.0), (2, 0.5)]
    assert said == []


def test_tensorboard_of_a_resumed_run_has_each_step_once(tmp_path, said):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write(["tensorboard"], tmp_path, said, 0, [1, 2, 3, 4])
    write(["tensorboard"], tmp_path, said, 2, [3, 4, 5])
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("lr")] == [1, 2, 3, 4, 5]


def wandb_records(path: Path) -> list:
    """Records of an offline file, which wandb's service ends a moment after `finish` returned."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        found = whole_records(path.read_bytes())
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        time.sleep(0.05)
    raise AssertionError(f"{path} was not ended")


def whole_records(data: bytes) -> list:
    """LevelDB's log format: 7 bytes before each record."""
    from wandb.proto import wandb_internal_pb2

    if not data:
        return []
    at, found = 7, []
    assert data[:4] == b":W&B" and len(data) < 32768, "one block of the format"
    while at + 7 <= len(data):
        length, kind = struct.unpack_from("<HB", data, at + 4)
        if at + 7 + length > len(data):
            break
        assert kind == 1, "a whole record"
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        record.ParseFromString(data[at + 7 : at + 7 + length])
        found.append(record)
        at += 7 + length
    return found


def test_wandb_without_a_network_keeps_every_number_for_later(tmp_path, said, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "first"
    write(["wandb"], run, said, 0, [1, 2])
    write(["wandb"], run, said, 2, [3])
    assert said == []
    files = sorted(run.glob("wandb/offline-run-*/run-*.wandb"))
    records = [record for file in files for record in wandb_records(file)]
    history = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    losses = [(h["_step"], h["loss/captions"]) for h in history if "loss/captions" in h]
    assert losses == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    kept = json.loads((run / trackers.IDS).read_text())["wandb"]
    assert {r.run_id for r in runs} == {kept} and {r.display_name for r in runs} == {"first"}
    assert "lr" in str(runs[0].config)


def test_wandb_without_a_key_asks_nobody_and_keeps_the_figures(tmp_path, said, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no .netrc
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    write(["wandb"], tmp_path / "first", said, 0, [1])
    assert said == []
    assert list((tmp_path / "first").glob("wandb/offline-run-*/run-*.wandb"))


def test_wandb_does_not_write_steps_that_the_service_has():
    tracker, logged = trackers.WandB(), []
    tracker.run = types.SimpleNamespace(log=lambda scalars, step: logged.append(step))  # type: ignore
    tracker.first = 4  # of a run that was killed after step 3, and goes on from step 2
    for step in (3, 4, 5):
        tracker.write({"lr": 1.0}, step)
    assert logged == [4, 5]


@pytest.mark.slow  # trackio speaks once more when the process ends, below pytest's closing line
def test_trackio_has_every_number_of_a_resumed_run_in_one_run(tmp_path, said, monkeypatch):
    pytest.importorskip("trackio")
    from trackio import sqlite_storage, utils

    for module in (sqlite_storage, utils):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "database")
    run = tmp_path / "first"
    write(["trackio"], run, said, 0, [1, 2])
    write(["trackio"], run, said, 2, [3])
    assert said == []
    storage = sqlite_storage.SQLiteStorage
    name = json.loads((run / trackers.IDS).read_text())["trackio"]
    assert storage.get_runs("flamingo") == [name] and name.startswith("first-")
    logs = [(log["step"], log["loss/captions"]) for log in storage.get_logs("flamingo", name)]
    assert logs == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert list((tmp_path / "database").glob("flamingo.db"))


class Faulty:
    """Fails in whatever it is told to."""

    how = ""
    calls: list[str] = []

    def open(self, run, start, settings):
        self._call("open")

    def write(self, scalars, step):
        self._call("write")

    def close(self):
        self._call("close")

    def _call(self, what):
        self.calls.append(what)
        if what == self.how:
            raise ConnectionError("the network\nis gone")


class Sound(Faulty):
    calls: list[str] = []


@pytest.fixture
def module(monkeypatch):
    """A module of one's own, for dotted paths."""
    made = types.ModuleType("my_lab_figures")
    made.Faulty, made.Sound, made.Nothing = Faulty, Sound, object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_lab_figures", made)
    monkeypatch.setattr(Faulty, "calls", [])
    monkeypatch.setattr(Sound, "calls", [])
    return made


@pytest.mark.parametrize(
    ("how", "calls"),
    [
        ("open", ["open"]),
        ("write", ["open", "write"]),
        ("close", ["open", "write", "write", "write", "close"]),
    ],
)
def test_a_tracker_that_fails_is_told_once_and_left_out(tmp_path, said, module, monkeypatch, how, calls):
    monkeypatch.setattr(module.Faulty, "how", how)
    monkeypatch.setattr(module.Sound, "how", "")
    write(["my_lab_figures.Faulty", "my_lab_figures.Sound"], tmp_path, said, 0, [1, 2, 3])
    assert module.Faulty.calls == calls
    assert module.Sound.calls == ["open", "write", "write", "write", "close"]
    (told,) = said
    assert "my_lab_figures.Faulty failed (ConnectionError: the network is gone)" in told
    assert "metrics.jsonl" in told


def test_a_service_that_ends_the_process_does_not_end_the_training(tmp_path, said, module, monkeypatch):
    monkeypatch.setattr(module.Faulty, "write", lambda *arguments: sys.exit(1))
    write(["my_lab_figures.Faulty"], tmp_path, said, 0, [1, 2])
    assert len(said) == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tensorbord", "unknown tracker 'tensorbord': trackers are tensorboard, trackio, wandb, or"),
        ("no_such_module.Board", "no class with open, write and close is there"),
        ("my_lab_figures.Missing", "no class with open, write and close is there"),
        ("my_lab_figures.Nothing", "no class with open, write and close is there"),
    ],
)
def test_an_unknown_tracker_lists_the_choices(module, name, words):
    with pytest.raises(ValueError, match=words):
        trackers.check([name])


@pytest.mark.parametrize(
    ("name", "extra"), [("tensorboard", "train"), ("wandb", "wandb"), ("trackio", "trackio")]
)
def test_a_missing_package_is_one_message_that_says_what_to_install(monkeypatch, name, extra):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ValueError, match=rf"{name} needs .*pip install 'flamingo-vlm\[{extra}\]'"):
        trackers.check([name])


def test_what_a_service_calls_a_run_is_kept_with_the_run(tmp_path):
    made = iter("abc")
    names = [trackers.kept_id(tmp_path, name, lambda: next(made)) for name in ("x", "y", "x")]
    assert names == ["a", "b", "a"]
    (tmp_path / trackers.IDS).write_text('{"x": "a')  # a killed writer cannot do that; a disk can
    assert trackers.kept_id(tmp_path, "x", lambda: next(made)) == "c"

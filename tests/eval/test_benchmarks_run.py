"""Each benchmark, from its official files to figures, with a tiny model that is asked for real."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from flamingo.eval.benchmarks import load
from flamingo.eval.config import EvalConfig
from flamingo.eval.predictor import Predictor
from flamingo.eval.results.summary import summarise
from flamingo.eval.run import Part, answer_files, read_answers
from flamingo.eval.task import Task
from tests.eval.fixtures_captions import WRITERS as CAPTIONS_AND_CLASSES
from tests.eval.fixtures_vqa import WRITERS as QUESTIONS
from tests.eval.harness_model import write_model

WRITERS = {**CAPTIONS_AND_CLASSES, **QUESTIONS}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", list(WRITERS))
def test_it_runs_from_official_files_to_figures(tmp_path, model, name):
    folder, answers = tmp_path / "data", tmp_path / "answers"
    folder.mkdir()
    answers.mkdir()
    WRITERS[name](folder)
    config = EvalConfig(benchmark=name, data=folder, shots=(0, 2), beams=1, control_limit=3)
    task = Task.of(config)
    tokens = load(name).MAX_NEW_TOKENS
    asked = Predictor(model, max_new_tokens=tokens, beams=1)
    part = Part(task, config, asked, answers, 0, 1)
    for setting in config.settings():
        part.run(setting)
    summary = summarise(task, config, answers, seconds=1.0)
    assert [metric["name"] for metric in summary["metrics"]] == list(load(name).METRICS)
    assert [s["name"] for s in summary["settings"]][:2] == ["0-shot", "2-shot"]
    assert len(summary["settings"]) == 5  # and three controls
    for said in summary["settings"]:
        for metric in said["metrics"].values():
            assert math.isfinite(metric["value"])
    records = read_answers(answer_files(answers, config.settings()[1]))
    assert {r["id"] for r in records} == {e.id for e in task.queries}
    for record in records:
        assert len(record["shots"]) == 2 and Path(record["image"]).exists()
        assert len(record["scores"]) == len(task.classes)
        assert record["prediction"] in ([c.strip() for c in task.classes] or [record["prediction"]])
    assert len({tuple(r["scores"]) or r["raw"] for r in records}) > 1  # pictures matter

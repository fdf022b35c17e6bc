"""`flamingo eval run` by itself and under launchers, and an evaluation within training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ASKED = [
    *("--benchmark", "easy_vqa", "--shots", "0", "--shots", "2", "--limit", "14"),
    *("--shots-limit", "8", "--control-limit", "6", "--beams", "2"),
]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--module"]


def answers(out: Path) -> dict[str, dict[str, dict]]:
    """Setting -> query -> its record, whoever wrote it."""
    found: dict[str, dict[str, dict]] = {}
    for path in (out / "answers").glob("*.jsonl"):
        setting = found.setdefault(path.name.rsplit(".", 2)[0], {})
        for record in map(json.loads, path.read_text().splitlines()):
            assert record["id"] not in setting, "a query was asked twice"
            setting[record["id"]] = record
    return found


def figures(out: Path) -> list[dict]:
    return json.loads((out / "eval.json").read_text())["settings"]


def launched(launcher: list[str], model: Path, out: Path) -> str:
    done = subprocess.run(
        [*launcher, "flamingo.eval", str(model), "--out", str(out), *ASKED],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def alone(trained: Path, tmp_path_factory: pytest.TempPathFactory, cli) -> Path:
    """The evaluation by one process."""
    out = tmp_path_factory.mktemp("alone")
    done = cli("eval", "run", trained / "model", "--out", out, *ASKED, "--processes", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0-shot" in done.stdout and "shots with each other's images" in done.stdout
    return out


def test_two_processes_of_torchrun_give_the_very_same_answers(alone, trained, tmp_path):
    said = launched(TORCHRUN, trained / "model", tmp_path)
    assert said.count("eval.json") == 1  # one of them speaks
    assert answers(tmp_path) == answers(alone) and figures(tmp_path) == figures(alone)


@pytest.mark.slow
def test_two_processes_of_deepspeed_give_the_very_same_answers(alone, trained, tmp_path):
    launched(DEEPSPEED, trained / "model", tmp_path)
    assert answers(tmp_path) == answers(alone) and figures(tmp_path) == figures(alone)


def test_the_page_tells_scores_controls_and_settings(alone):
    page = (alone / "eval.html").read_text()
    assert "easy-VQA" in page and "images blanked" in page and "data:image/png;base64," in page


def test_two_evaluations_are_compared(alone, cli):
    done = cli("eval", "compare", alone, alone)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (alone / "eval-compare.html").is_file()


def test_training_evaluates_on_the_way_on_all_ranks(world, tmp_path, cli):
    run = tmp_path / "run"
    asked = "{every: 3, settings: {benchmark: easy_vqa, shots: [0, 2], zero_shot: none, limit: 9}}"
    done = cli(
        "train", world / "recipe.yaml", f"run={run}", f"evaluate={asked}", "--processes", "2", "log_every=4"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scored = {record["step"]: record["scores"] for record in records if "scores" in record}
    assert scored.keys() == {3, 4} and all(s.keys() == {"0-shot", "2-shot"} for s in scored.values())
    assert "evaluation after step 3: 0-shot" in done.stdout + done.stderr
    files = sorted((run / "evaluations" / "step-000003").glob("0-shot-seed0.*.jsonl"))
    assert [sum(1 for _ in file.open()) for file in files] == [4, 5]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("{every: 2, settings: {benchmark: nothing}}", "benchmark 'nothing': choose one of"),
        ("{every: 2, settings: {benchmark: easy_vqa, shot: 3}}", "did you mean 'shots'?"),
    ],
)
def test_an_evaluation_that_cannot_be_is_said_before_training(world, tmp_path, cli, asked, said):
    run = tmp_path / "run"
    done = cli("train", world / "recipe.yaml", f"run={run}", f"evaluate={asked}", "--processes", "1")
    assert done.returncode != 0 and said in done.stdout + done.stderr
    assert not run.exists()


def test_pieces_of_weights_are_not_evaluated_within_training(world, cli, tmp_path):
    asked = "{every: 2, settings: {benchmark: easy_vqa}}"
    done = cli("train", world / "recipe.yaml", f"run={tmp_path / 'run'}", f"evaluate={asked}", "zero_stage=3")
    assert done.returncode != 0 and "set zero_stage to 2" in done.stdout + done.stderr

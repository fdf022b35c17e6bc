"""lm-evaluation-harness loads a model folder as hf-multimodal: runs of that harness on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="lm_eval is not installed (the dev extra brings it)")
from lm_eval import evaluator  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from flamingo.eval.asking import Asked, Asker  # noqa: E402
from tests.eval.harness_model import picture, write_model  # noqa: E402

ASK = "<image>Question: what color is the shape? Answer:"
CODE = """
from PIL import Image

def doc_to_image(doc):
    return [Image.open(path) for path in doc["images"]]
"""
TASK = """
task: shapes
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: generate_until
doc_to_image: !function code.doc_to_image
doc_to_text: "{{{{text}}}}"
doc_to_target: answer
generation_kwargs: {{until: ["<|endofchunk|>"], max_gen_toks: 5, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def rows(tmp_path, monkeypatch, folder) -> list[dict]:
    """A local task of interleaved prompts, one of whose answers is right."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for number in range(4):
        picture(number).save(tmp_path / f"{number}.png")
    paths = [str(tmp_path / f"{number}.png") for number in range(4)]
    shot = f"{ASK} red<|endofchunk|>"
    found = [{"images": paths[n : n + 2], "text": shot + ASK, "answer": "red"} for n in range(3)]
    found.append({"images": paths[3:], "text": ASK, "answer": expected(folder, [(ASK, paths[3:])])[0]})
    (tmp_path / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in found))
    (tmp_path / "code.py").write_text(CODE)
    (tmp_path / "shapes.yaml").write_text(TASK.format(rows=tmp_path / "rows.json"))
    return found


def expected(folder: Path, asked: list[tuple[str, list[str]]]) -> list[str]:
    asker = Asker(folder, device="cpu")
    prompts = [Asked(text, tuple(images)) for text, images in asked]
    return [said.text for said in asker.generate(prompts, {"max_new_tokens": 5})]


@pytest.mark.parametrize("chat", [False, True])
def test_a_run_gives_the_answers_of_the_folders_own_classes(folder, rows, tmp_path, chat):
    found = evaluator.simple_evaluate(
        model="hf-multimodal",
        model_args=f"pretrained={folder},dtype=float32",
        tasks=["shapes"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        batch_size=2,
        apply_chat_template=chat,
        bootstrap_iters=0,
    )
    assert found is not None
    said = [sample["resps"][0][0].strip() for sample in found["samples"]["shapes"]]
    assert said == expected(folder, [(row["text"], row["images"]) for row in rows])
    assert found["results"]["shapes"]["exact_match,none"] == 0.25


@pytest.mark.slow
def test_the_command_line_of_that_harness_knows_flamingo(folder, rows, tmp_path):
    command = [sys.executable, "-m", "flamingo.eval.lm_eval", "run", "--model", "hf-multimodal"]
    command += ["--model_args", f"pretrained={folder},dtype=float32", "--tasks", "shapes", "--device", "cpu"]
    command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["shapes"]["exact_match,none"] == 0.25

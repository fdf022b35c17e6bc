"""The whole path in miniature: shards -> two ranks under DeepSpeed -> evaluation -> report -> use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from flamingo import FlamingoForConditionalGeneration, FlamingoProcessor
from flamingo.train.checkpoint import Saved


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_training_logs_what_shows_whether_the_model_learns_to_look(trained: Path):
    steps = records(trained)
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    for record in steps:
        assert set(record["loss"]) == {"captions", "questions"}
        assert record["grad_norm"] > 0 and record["lr"] >= 0
        assert len(record["gate_attention"]) == len(record["gate_feed_forward"]) == 2
        assert record["samples"] == 8 and record["images"] == 12
        for rate in ("samples", "tokens", "images", "flops"):
            assert record[f"{rate}_per_second"] > 0
        assert record["grad_norms"].keys() >= {"resampler", "gates", "gated_blocks", "embeddings"}
        assert 0 < record["padding_share"] < 1 and 0 <= record["data_share"] <= 1
        assert record["memory_gb"] > 0 and record["peak_share"] > 0
    assert [record["step"] for record in steps if "loss_blank" in record] == [1, 3, 4]
    assert json.loads((trained / "train.json").read_text())["ranks"] == 2
    assert list((trained / "tensorboard").glob("events.*"))


def test_only_connecting_parts_change_and_are_checkpointed(trained: Path, world: Path):
    exported = load_file(trained / "model" / "model.safetensors")
    frozen = load_file(world / "language" / "model.safetensors")
    for name, tensor in frozen.items():
        assert torch.equal(exported[f"language_model.{name}"], tensor.bfloat16()), name
    names = Saved(trained / "checkpoints" / "step-000004").names
    rooms = ("model.resampler.", "model.gated_blocks.", "model.added_tokens.")
    assert names and all(name.startswith(rooms) for name in names)


def test_one_rank_and_two_ranks_take_the_same_steps(trained: Path, world: Path, cli):
    alone = world / "alone"
    done = cli("train", world / "recipe.yaml", f"run={alone}", "--processes", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    for one, two in zip(records(alone), records(trained), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=2e-2)  # bfloat16 arithmetic
        assert one["tokens"] == two["tokens"]


def test_resume_takes_the_steps_of_an_unbroken_run(trained: Path, world: Path, cli):
    part = world / "part"
    shutil.copytree(trained, part)
    shutil.rmtree(part / "checkpoints" / "step-000004")
    shutil.rmtree(part / "model")
    recipe = (part / "recipe.yaml").read_text()
    (part / "recipe.yaml").write_text(recipe.replace(str(trained), str(part)))
    arguments = ("train", world / "recipe.yaml", f"run={part}", "--resume", "--processes", "2")
    done = cli(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    kept = ("step", "loss", "lr", "grad_norm", "gate_attention", "samples", "tokens")
    for broken, whole in zip(records(part), records(trained), strict=True):
        assert {k: broken[k] for k in kept} == {k: whole[k] for k in kept}
    again, first = (load_file(r / "model" / "model.safetensors") for r in (part, trained))
    assert all(torch.equal(again[name], first[name]) for name in first)


EVALUATE = (*("eval", "run", "--benchmark", "easy_vqa", "--shots", "0", "--shots", "4"), "--beams", "1")


def test_evaluation_report_and_use_of_the_trained_model(trained: Path, tmp_path: Path, cli):
    few = ("--limit", "30", "--shots-limit", "12", "--control-limit", "12")
    done = cli(*EVALUATE, trained / "model", "--out", trained, *few, "--processes", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    settings = {s["name"]: s for s in json.loads((trained / "eval.json").read_text())["settings"]}
    assert {name: s["n"] for name, s in settings.items()} == {
        "0-shot": 30,
        "4-shot": 12,
        "0-shot, images blanked": 12,
        "4-shot, shots without images": 12,
        "4-shot, shots with each other's images": 12,
    }
    done = cli("report", trained)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((trained / "report.json").read_text())
    assert report["accuracy"] == settings["0-shot"]["metrics"]["exact_match"]["value"]
    assert report["train_seconds"] > 0 and report["samples_per_second"] > 0
    page = (trained / "report.html").read_text()
    assert "<svg" in page and "data:image/png;base64," in page
    assert "images blanked" in (trained / "eval.html").read_text(), "the evaluation's page is beside it"

    picture = tmp_path / "picture.png"
    Image.new("RGB", (64, 64), "blue").save(picture)
    prompt = "Question: what color is the shape? Answer:"
    done = cli("generate", "--model", trained / "model", "--image", picture, "--prompt", prompt)
    assert done.returncode == 0, done.stderr
    model = FlamingoForConditionalGeneration.from_pretrained(trained / "model").eval()
    processor = FlamingoProcessor.from_pretrained(trained / "model")
    inputs = processor(text=f"<image>{prompt}", images=[Image.open(picture)])
    output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    answer = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert done.stdout.strip() == answer.strip()


def test_an_interrupted_evaluation_goes_on_with_another_number_of_processes(
    trained: Path, tmp_path: Path, cli
):
    few = ("--limit", "20", "--shots-limit", "6", "--control-limit", "6")
    arguments = (*EVALUATE, trained / "model", "--out", tmp_path, *few)
    done = cli(*arguments, "--processes", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    whole = json.loads((tmp_path / "eval.json").read_text())["settings"]
    first = tmp_path / "answers" / "0-shot-seed0.0.jsonl"
    lines = first.read_text().splitlines(keepends=True)
    first.write_text("".join(lines[:4]) + lines[4][:20])  # killed while writing the fifth line
    done = cli(*arguments, "--processes", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "eval.json").read_text())["settings"] == whole

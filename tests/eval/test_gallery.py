"""The gallery: chosen answers, the shots before them, and maps over the query's own picture."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flamingo.eval.config import EvalConfig
from flamingo.eval.few_shot import Prompt
from flamingo.eval.gallery import SHOT_SIDE, SIDE, choose, gallery, looks
from flamingo.eval.predictor import Predictor
from flamingo.eval.run import Part
from flamingo.eval.task import Task
from tests.eval import made_evaluations as made
from tests.eval.harness_model import write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def answered(model: Path, answers: Path, **settings) -> tuple[Task, EvalConfig, list[dict]]:
    """The benchmark asked for real, and its gallery."""
    given = {"benchmark": made.NAME, "control_limit": 0, "beams": 1, "limit": 12, **settings}
    config = EvalConfig(**given)
    task = Task.of(config)
    answers.mkdir()
    tokens = task.benchmark.MAX_NEW_TOKENS
    part = Part(task, config, Predictor(model, max_new_tokens=tokens), answers, 0, 1, quiet=True)
    for setting in config.settings():
        part.run(setting)
    return task, config, gallery(model, task, config, answers)


def size(png: str) -> tuple[int, int]:
    return Image.open(io.BytesIO(base64.b64decode(png))).size


def test_entries_show_the_query_its_shots_and_where_each_word_looked(model, tmp_path, monkeypatch):
    module = made.benchmark(tmp_path / "data", monkeypatch)
    assert module.examples(None, "test") and module.examples(None, "train")  # which draws the pictures
    for path in (tmp_path / "data").glob("*"):
        Image.open(path).resize((600, 300)).save(path)
    task, _, entries = answered(model, tmp_path / "answers", shots=(0, 2, 4), zero_shot="text")
    assert [e["setting"] for e in entries] == ["0-shot"] * 12 + ["2-shot"] * 8
    assert {e["kind"] for e in entries} == set(made.KINDS)
    for entry in entries:
        assert json.loads(json.dumps(entry)) == entry
        assert [w["word"].lower() for w in entry["words"]] == entry["prediction"].split()
        for word in entry["words"]:
            grid = np.array(word["map"])
            assert grid.shape == (2, 2) and grid.min() >= 0 and grid.sum() == pytest.approx(1, abs=1e-4)
        assert len(entry["shots"]) == 2 and {s["answer"] for s in entry["shots"]} <= set(made.COLOURS)
        assert size(entry["image_png"]) == (SIDE, SIDE // 2)
        for shot in entry["shots"]:
            png = shot["image_png"]  # of 0 shots the text alone was shown
            assert png is None if entry["setting"] == "0-shot" else size(png) == (SHOT_SIDE, SHOT_SIDE // 2)
    assert len({e["prediction"] for e in entries if e["words"]}) > 1
    assert {e["answer"] for e in entries} <= {q.answers[0] for q in task.queries}


def test_maps_are_those_of_the_positions_that_chose_the_words(model, tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "b.png")
    images = (tmp_path / "b.png",)
    prompt = Prompt(None, "<image>a red", (tmp_path / "a.png",), "<image>Answer:", images)  # type: ignore[arg-type]
    predictor = Predictor(model)
    tokenizer, flamingo = predictor.processor.tokenizer, predictor.model  # type: ignore[attr-defined]
    words = looks(predictor, prompt, " blue green")
    assert [w["word"] for w in words] == ["blue", "green"]
    before = tokenizer(prompt.prefix + prompt.text, add_special_tokens=False)["input_ids"]
    said = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" blue", " green")]
    ids = torch.tensor([[*before, *said[0], *said[1]]])
    pixels = torch.stack([predictor.pixels(image) for image in (*prompt.prefix_images, *images)])
    with torch.inference_mode():
        maps = flamingo.attention_maps(ids, pixels)[0]
    start = len(before) - 1
    for word, tokens in zip(words, said, strict=True):
        expected = maps[start : start + len(tokens)].mean(0)
        assert np.array(word["map"]).ravel() == pytest.approx(expected.numpy(), abs=1e-6)
        start += len(tokens)
    assert looks(predictor, prompt, " ") == []


def test_of_ranked_classes_the_prompts_last_token_is_shown(model, tmp_path, monkeypatch):
    answers = {"MAX_NEW_TOKENS": 0, "CLASSES": lambda data: tuple(f" {c}" for c in made.COLOURS)}
    made.benchmark(tmp_path / "data", monkeypatch, **answers)
    _, _, entries = answered(model, tmp_path / "answers", shots=(2,))
    assert len(entries) == 8 and all(e["setting"] == "2-shot" for e in entries)
    for entry in entries:
        (word,) = entry["words"]
        assert word["word"] == entry["prediction"] in made.COLOURS
        assert np.array(word["map"]).sum() == pytest.approx(1, abs=1e-4)


def test_a_third_of_what_is_chosen_is_wrong_where_it_can_be():
    def record(number: int, score: float | None) -> dict:
        return {"id": str(number), "score": score, "kind": str(number % 4)}

    mixed = [record(i, float(i % 2 == 0)) for i in range(100)] + [record(100 + i, 1.0) for i in range(100)]
    chosen = choose(mixed, 12)
    assert len({r["id"] for r in chosen}) == 12 and sum(not r["score"] for r in chosen) == 4
    assert {r["kind"] for r in chosen if r["score"]} == set("0123")
    assert choose(mixed, 12) == chosen
    wrong = [record(i, 0.0) for i in range(30)]
    assert len(choose(wrong, 12)) == 12 and len(choose(wrong[:5], 12)) == 5
    assert len(choose([record(i, None) for i in range(30)], 12)) == 12
    assert [r["score"] for r in choose([record(0, 0.3), record(1, 0.6)], 3)] == [0.6, 0.3]

"""CLIPScore and RefCLIPScore against a computation by hand, as metrics and of answers that are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from flamingo.eval import metrics
from flamingo.eval.benchmarks import Example, Prediction
from flamingo.eval.metrics import _clip
from tests.clip.conftest import CAPTIONS, fails, passes, run
from tests.eval import made_evaluations


@pytest.fixture(autouse=True)
def chosen(encoder, monkeypatch):
    monkeypatch.setenv(_clip.NAMED_BY, encoder)


def by_hand(encoder: str, caption: str, picture: Path, references: list[str]) -> tuple[float, float]:
    """The formulas of the paper, section 3, with open_clip's own features."""
    name = f"local-dir:{encoder.removeprefix('open_clip:')}"
    made: Any = open_clip.create_model_from_pretrained(name)
    model, prepare = made[0].eval(), made[1]
    tokens = open_clip.get_tokenizer(name)([f"A photo depicts {text}" for text in (caption, *references)])
    with torch.no_grad():
        texts = model.encode_text(tokens, normalize=True)
        image = model.encode_image(prepare(Image.open(picture).convert("RGB"))[None], normalize=True)[0]
    score = 2.5 * max(float(texts[0] @ image), 0)
    near = max(0.0, *(float(texts[0] @ each) for each in texts[1:]))
    return score, 2 * score * near / (score + near) if score + near else 0.0


def test_scores_are_the_papers_formulas(sides, encoder):
    found = [metrics.load(name).per_sample(*sides) for name in ("clip_score", "ref_clip_score")]
    pairs = zip(*sides, strict=True)
    expected = [by_hand(encoder, p.text, e.image, list(e.answers)) for p, e in pairs]
    assert np.array(expected).max() > 0.1
    np.testing.assert_allclose(np.array(found).T, expected, atol=1e-5)
    for name, values in zip(("clip_score", "ref_clip_score"), found, strict=True):
        assert values is not None
        assert metrics.load(name).value(*sides) == pytest.approx(sum(values) / len(values), abs=1e-12)


def test_a_caption_that_points_away_from_its_picture_scores_0(sides, monkeypatch):
    predictions, examples = sides
    whole = _clip._vectors

    def mirrored(by, part, items):
        return {key: -row if part == "image" else row for key, row in whole(by, part, items).items()}

    positive = metrics.load("clip_score").per_sample(predictions, examples)
    monkeypatch.setattr(_clip, "_vectors", mirrored)
    negative = metrics.load("clip_score").per_sample(predictions, examples)
    assert positive is not None and negative is not None
    assert all(min(pair) == 0 < max(pair) for pair in zip(positive, negative, strict=True))
    of_both = metrics.load("ref_clip_score").per_sample(predictions, examples)
    assert of_both is not None and [score == 0 for score in of_both] == [score == 0 for score in negative]


def test_references_are_needed_by_the_second_alone(sides):
    predictions, examples = sides
    bare = [Example(e.id, e.image) for e in examples]
    assert metrics.load("clip_score").per_sample(predictions, bare) is not None
    assert metrics.load("ref_clip_score").per_sample(predictions, bare) is None
    with pytest.raises(ValueError, match="6 of 6 pictures have no reference captions"):
        metrics.load("ref_clip_score").value(predictions, bare)
    for name in ("clip_score", "ref_clip_score"):
        with pytest.raises(ValueError, match="no captions to score"):
            metrics.load(name).value([], [])


def test_pictures_and_encoders_that_cannot_be_used_are_refused(sides, monkeypatch, tmp_path):
    from tests.eval.harness_model import write_model

    predictions, examples = sides
    gone = [Example("0", tmp_path / "gone.png")]
    with pytest.raises(ValueError, match=r"gone\.png is not there"):
        metrics.load("clip_score").value(predictions[:1], gone)
    monkeypatch.setenv(_clip.NAMED_BY, "open_clip:no_such_net/openai")
    with pytest.raises(ValueError, match="no architecture 'no_such_net'"):
        metrics.load("clip_score").value(predictions, examples)
    monkeypatch.setenv(_clip.NAMED_BY, f"model:{write_model(tmp_path / 'model')}")
    with pytest.raises(ValueError, match="CLIPScore compares pictures with texts"):
        metrics.load("clip_score").value(predictions, examples)


def test_an_evaluation_reports_them_and_the_command_says_the_same(encoder, tmp_path, monkeypatch):
    made_evaluations.benchmark(tmp_path / "data", monkeypatch, 12, METRICS=("clip_score", "ref_clip_score"))
    out = made_evaluations.write(
        tmp_path / "results", made_evaluations.Answerer(0.9), pool=8, control_limit=0
    )
    told = json.loads((out / "eval.json").read_text())
    assert [metric["title"] for metric in told["metrics"]] == ["CLIPScore", "RefCLIPScore"]
    lines = [json.loads(line) for line in passes(run("score", out, "--json")).splitlines()]
    assert [line["setting"] for line in lines] == [setting["name"] for setting in told["settings"]]
    for line, setting in zip(lines, told["settings"], strict=True):
        for name, figures in setting["metrics"].items():
            assert line[name]["value"] == pytest.approx(figures["value"], abs=1e-9)
            assert line[name]["interval"] == pytest.approx(figures["interval"], abs=1e-9)


# ---- the command -----------------------------------------------------------------------------------


def test_answers_of_an_evaluation_are_scored_without_its_model(evaluated, sides, encoder, tmp_path):
    predictions, examples = sides
    done = run("score", evaluated, "--encoder", encoder, "--json", "--each", tmp_path / "each.jsonl")
    scored = json.loads(passes(done))
    assert (scored["setting"], scored["n"], scored["empty"]) == ("0-shot", 12, 1)
    for name in ("clip_score", "ref_clip_score"):
        shouted = [Prediction(p.id, p.text + "!") for p in predictions]
        means = [metrics.load(name).value(each, examples) for each in (predictions, shouted)]
        assert scored[name]["value"] == pytest.approx(sum(means) / 2)
        low, high = scored[name]["interval"]
        assert low < scored[name]["value"] < high
    each = [json.loads(line) for line in (tmp_path / "each.jsonl").read_text().splitlines()]
    values = metrics.load("clip_score").per_sample(*sides)
    assert [record["seed"] for record in each] == [0] * 6 + [1] * 6 and each[1]["caption"] == CAPTIONS[1]
    assert [record["clip_score"] for record in each[:6]] == pytest.approx(values, abs=1e-6)


def test_scores_are_lines_to_read(evaluated, encoder):
    done = run("score", evaluated, "--encoder", encoder)
    first, second = passes(done).splitlines()
    assert first.startswith("0-shot CLIPScore ") and second.startswith("0-shot RefCLIPScore ")
    assert first.endswith(", 12 captions)") and "1 of these captions are empty" in done.stderr


def test_a_file_of_captions_is_scored(photos, encoder, tmp_path):
    lines = [{"image": str(photos / "red" / "0.png"), "caption": "a red thing"}]
    lines += [{"image": str(photos / "red" / "4.png"), "prediction": "x", "id": 7}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    scored = json.loads(passes(run("score", tmp_path / "c.jsonl", "--json")))
    expected = [by_hand(encoder, *pair)[0] for pair in (
        ("a red thing", photos / "red" / "0.png", ["x"]), ("x", photos / "red" / "4.png", ["x"]),
    )]  # fmt: skip
    assert scored["clip_score"]["value"] == pytest.approx(sum(expected) / 2, abs=1e-5)
    assert "ref_clip_score" not in scored and scored["encoder"].startswith("open_clip:local-dir:")


def test_pictures_that_were_moved_are_named_by_their_folder(evaluated, photos, encoder):
    moved = photos.parent / "moved"
    moved.mkdir()
    for picture in photos.rglob("*.png"):
        picture.rename(moved / picture.name)
    fails(run("score", evaluated), "of answer 0 is not there: name its folder with --images")
    passes(run("score", evaluated, "--images", moved))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no captions"),
        ("no json\n", "line 1: no JSON"),
        ("[1]\n", "line 1: must be an object"),
        ('{"image": "a.png"}\n', "answer 1: needs an image and a prediction or caption"),
        ('{"image": "a.png", "caption": "x", "answers": "y"}\n', "answers or references must be a list"),
        ('{"image": "/no/a.png", "caption": "x"}\n', "picture /no/a.png of answer 1 is not there"),
    ],
)
def test_files_without_captions_are_refused(tmp_path, text, said):
    (tmp_path / "c.jsonl").write_text(text)
    fails(run("score", tmp_path / "c.jsonl"), said)


def test_folders_without_answers_are_refused(evaluated, tmp_path):
    fails(run("score", tmp_path), "holds no evaluation: name the --out of `flamingo eval run`")
    fails(run("score", tmp_path / "nothing"), "nothing")
    for file in (evaluated / "answers").glob("*.jsonl"):
        file.unlink()
    fails(run("score", evaluated), "holds no answers yet")

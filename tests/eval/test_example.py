"""example.png: a strip of answered pictures, made of what the gallery holds."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

pytest.importorskip("matplotlib")

from flamingo.eval import charts, example  # noqa: E402
from flamingo.eval.report import write_report  # noqa: E402


def entry(number: int, correct: bool | None = True, size: tuple[int, int] = (192, 192), **other: Any) -> dict:
    """An answer in the form of `report.read_gallery`; its map is bright at the upper left alone."""
    grid = np.full((4, 4), 0.01)
    grid[0, 0] = 0.85
    words = [{"word": "a", "map": np.full((4, 4), 1 / 16)}, {"word": "blue", "map": grid}]
    made = {"question": f"what is number {number}?", "answer": "red", "prediction": f"answer{number}"}
    made |= {"kind": str(number), "correct": correct, "words": words, "setting": "0-shot"}
    return {**made, "image": PIL.Image.new("RGB", size, "#2050e0"), **other}


def test_right_answers_of_different_kinds_come_first():
    entries = [entry(0, False), entry(1), entry(2, prediction="answer1"), entry(3, kind="1"), entry(4)]
    assert [e["kind"] for e in example.choose(entries, 2)] == ["1", "4"]
    assert [e["question"][-2] for e in example.choose(entries, 4)] == ["1", "4", "3", "2"]
    assert len(example.choose(entries, 9)) == 5 and example.choose(entries, 9)[-1]["correct"] is False
    silent = entry(5, words=[], prediction="")
    assert example.choose([silent]) == []


def test_the_strip_shows_pictures_and_below_them_where_the_last_word_looked(tmp_path: Path):
    path = tmp_path / example.NAME
    assert example.write_example(path, [entry(n) for n in range(6)]) == path
    with PIL.Image.open(path) as opened:
        strip = np.asarray(opened.convert("RGBA")).astype(int)
    height, width = strip.shape[:2]
    columns = example.COUNT * (example.SIDE + example.GAP) - example.GAP
    assert width == columns + 2 * example.EDGE and height > 2 * example.SIDE
    assert (
        strip[0, 0, 3] == 0 and strip[height // 2, example.EDGE // 2, 3] == 255
    )  # round corners, own ground
    shown = example._fitted(entry(0)["image"])
    last = entry(0)["words"][1]["map"]
    expected = np.asarray(charts.overlay(shown, last, charts.heat_top([last])))
    for column in range(example.COUNT):
        left = example.EDGE + column * (example.SIDE + example.GAP)
        part = strip[:, left : left + example.SIDE, :3]
        blue = np.flatnonzero((part[:, example.SIDE // 2] == (0x20, 0x50, 0xE0)).all(-1))
        assert len(blue) == example.SIDE - 2  # the picture, whole, inside its line
        below = range(blue.max() + 2, height - example.SIDE)
        assert any(np.array_equal(part[y : y + example.SIDE], expected) for y in below)


def test_any_shape_of_picture_and_any_length_of_text_fits(tmp_path: Path):
    long = "Which of the many animals in the background is looking at the " + "very " * 30 + "small bird?"
    entries = [
        entry(0, size=(192, 48), question=long),
        entry(1, size=(40, 192), question="incomprehensibilities" * 4, prediction="yes " * 40),
        entry(2, False, prediction="blue"),
        entry(3, None),
    ]
    path = tmp_path / example.NAME
    assert example.write_example(path, entries) == path
    with PIL.Image.open(path) as opened:
        assert opened.width == 4 * (example.SIDE + example.GAP) - example.GAP + 2 * example.EDGE
    font = example._font(example.QUESTION)
    for text in (long, "incomprehensibilities" * 4, "short?", ""):
        rows = example._wrapped(text, font)
        assert 1 <= len(rows) <= example.LINES and all(font.getlength(row) <= example.SIDE for row in rows)
    assert example._wrapped(long, font)[-1].endswith("…") and example._wrapped("short?", font) == ["short?"]
    assert example._said(entries[2]) == "blue (right: red)" and example._said(entries[3]) == "answer3"


def test_without_answers_nothing_is_written(tmp_path: Path):
    assert example.write_example(tmp_path / example.NAME, []) is None
    assert not (tmp_path / example.NAME).exists()


@pytest.mark.parametrize("setting, written", [("0-shot", True), ("4-shot", False)])
def test_a_report_writes_the_strip_of_answers_without_shots(tmp_path: Path, setting: str, written: bool):
    step = {"step": 1, "seconds": 1.0, "loss": {"a": 1.0}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(step) + "\n")
    (tmp_path / "train.json").write_text(json.dumps({"steps": 1, "train_seconds": 1.0}))
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (64, 64), "red").save(buffer, format="PNG")
    made = entry(0, setting=setting, score=1.0, shots=[])
    words = [{**word, "map": word["map"].tolist()} for word in made["words"]]
    made |= {"image_png": base64.b64encode(buffer.getvalue()).decode(), "words": words}
    del made["image"]
    (tmp_path / "gallery.json").write_text(json.dumps([made]))
    write_report(tmp_path)
    assert (tmp_path / example.NAME).exists() is written

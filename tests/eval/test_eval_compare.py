"""Two evaluations compared: pairs of answers, tests that fit, and a verdict that chance does not make."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pytest.importorskip("matplotlib")
scipy_stats = pytest.importorskip("scipy.stats")

from flamingo.eval.results.compare import compare  # noqa: E402
from tests.eval import made_evaluations as made  # noqa: E402


@pytest.fixture
def colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return made.benchmark(tmp_path / "data", monkeypatch)


def compared(one: Path, other: Path, out: Path | None = None) -> tuple[dict[str, dict], dict, str]:
    """(pairs by setting, eval-compare.json, the table)."""
    text = compare(one, other, out)
    found = json.loads(((out or one) / "eval-compare.json").read_text())
    return {pair["name"]: pair for pair in found["pairs"]}, found, text


def scores(out: Path, slug: str) -> dict[str, float]:
    records = [json.loads(line) for line in (out / "answers" / f"{slug}.0.jsonl").read_text().splitlines()]
    return {record["id"]: record["score"] for record in records}


def test_answers_to_the_same_query_are_paired_and_tested_exactly(colours, tmp_path):
    one = made.write(tmp_path / "a", made.Answerer(0.95))
    other = made.write(tmp_path / "b", made.Answerer(0.4), fingerprint="g")
    pairs, found, text = compared(one, other)
    pair, (a, b) = pairs["0-shot"], (scores(side, "0-shot-seed0") for side in (one, other))
    won, lost = (sum(way * (b[q] - a[q]) > 0 for q in a) for way in (1, -1))
    assert (pair["won"], pair["lost"], pair["n"]) == (won, lost, 80)
    assert pair["test"] == "exact McNemar test"
    assert pair["p"] == pytest.approx(scipy_stats.binomtest(won, won + lost).pvalue)
    assert pair["difference"] == pytest.approx(np.mean(list(b.values())) - np.mean(list(a.values())))
    low, high = pair["interval"]
    assert low < pair["difference"] < high < 0 and pair["more_than_chance"]
    assert pairs["0-shot, images blanked"]["p"] == 1.0  # both guess the same
    assert not pairs["0-shot, images blanked"]["more_than_chance"]
    assert found["headline"].startswith("B is worse at 0-shot (-") and found["headline"] in text
    assert re.search(r"^0-shot +\d.*more than chance$", text, re.M)
    assert re.search(r"^0-shot, images blanked .*may be chance$", text, re.M)
    assert str(one / "eval-compare.html") in text


def test_an_evaluation_beside_itself_differs_in_nothing(colours, tmp_path):
    one = made.write(tmp_path / "a", made.Answerer(0.5), trials=2)
    pairs, found, _ = compared(one, one, tmp_path / "out" / "deep")
    assert all(p["p"] == p["p_holm"] == 1.0 and p["difference"] == 0 for p in pairs.values())
    assert found["headline"] == "No difference is more than chance." and found["same_model"]
    page = (tmp_path / "out" / "deep" / "eval-compare.html").read_text()
    assert "Both are of the same model." in page and not (one / "eval-compare.html").exists()


def test_p_values_count_for_all_settings_together(colours, tmp_path):
    one = made.write(tmp_path / "a", made.Answerer(0.6))
    other = made.write(tmp_path / "b", made.Answerer(0.5, salt=1))
    pairs, _, _ = compared(one, other)
    assert len(pairs) == 5 and all(p["p_holm"] >= p["p"] for p in pairs.values())
    least = min(pairs.values(), key=lambda p: p["p"])
    assert least["p_holm"] == pytest.approx(min(1.0, 5 * least["p"]))


def test_chance_is_rarely_called_a_difference(tmp_path, monkeypatch):
    """Two models that see equally well, again and again: 5 % of first tests at most, but for luck."""
    made.benchmark(tmp_path / "data", monkeypatch, queries=40)
    asked = {"shots": (0,), "control_limit": 0}
    outs = [made.write(tmp_path / str(i), made.Answerer(0.5, salt=i), **asked) for i in range(16)]
    called = [
        compared(a, b)[0]["0-shot"]["more_than_chance"] for a, b in zip(outs[::2], outs[1::2], strict=True)
    ]
    assert sum(called) <= 2


def test_with_several_seeds_a_query_counts_once(colours, tmp_path):
    asked = {"shots": (2,), "control_limit": 0, "trials": 3}
    one = made.write(tmp_path / "a", made.Answerer(0.9), **asked)
    other = made.write(tmp_path / "b", made.Answerer(0.9, 0.5), **asked)
    pair = compared(one, other)[0]["2-shot"]
    assert pair["n"] == 80 and pair["seeds"] == 3 and pair["test"] == "paired permutation test"
    assert pair["more_than_chance"] and pair["p"] == pytest.approx(1 / 10001)


def test_only_common_queries_seeds_and_settings_count(colours, tmp_path):
    one = made.write(tmp_path / "a", made.Answerer(0.9), shots=(0, 4), trials=2)
    other = made.write(tmp_path / "b", made.Answerer(0.3), shots=(0, 8), limit=30, control_limit=0)
    pairs, found, text = compared(one, other)
    assert pairs.keys() == {"0-shot"} and pairs["0-shot"]["n"] == 30 and pairs["0-shot"]["seeds"] == 1
    assert "4-shot" in found["left_out"] and "8-shot" in found["left_out"] and "8-shot" not in text
    assert found["settings_that_differ"]["limit"] == [None, 30]
    assert found["settings_that_differ"]["trials"] == [2, 1]
    assert "benchmark" not in found["settings_that_differ"]


def test_a_metric_of_the_whole_is_tested_by_swapping_answers(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    module = made.benchmark(tmp_path / "data", monkeypatch, 60, METRICS=("roc_auc",), MAX_NEW_TOKENS=0)
    coloured = module.examples
    module.examples = lambda data, split: [
        replace(e, answers=("yes" if e.answers[0] in ("red", "blue") else "no",))
        for e in coloured(data, split)
    ]
    asked = {"shots": (0,), "control_limit": 0}
    one, other, alike = (
        made.write(tmp_path / str(i), made.Answerer(sight, salt=i), **asked)
        for i, sight in enumerate((0.05, 1.5, 0.05))
    )
    # The hundreds of ROC curves of a whole run are not needed to tell these apart.
    monkeypatch.setattr("flamingo.eval.results.compare.SWAPS", 99)
    pair = compared(one, other)[0]["0-shot"]
    assert pair["difference"] > 0.2 and pair["p"] == 0.01 and pair["won"] is None
    assert pair["interval"][0] > 0 and "swaps" in pair["test"] and pair["more_than_chance"]
    assert not compared(one, alike)[0]["0-shot"]["more_than_chance"]


def test_the_page_shows_what_changed_and_needs_nothing_from_outside(colours, tmp_path):
    one = made.write(tmp_path / "a", made.Answerer(0.95))
    other = made.write(tmp_path / "b", made.Answerer(0.4), beams=1)
    _, found, _ = compared(one, other)
    text = (one / "eval-compare.html").read_text()
    assert found["pairs"][0]["changed"][0]["question"] in text and "beams" in text
    for pair in found["pairs"]:
        assert pair["name"].replace("'", "&#39;") in text
        assert f"{100 * pair['difference']:+.2f}" in text
    assert not re.search(r"<script|<link|@import|https?://", text)


def test_text_of_answers_is_escaped(colours, tmp_path):
    one = made.write(tmp_path / "a", made.Answerer(0.95))
    other = made.write(tmp_path / "b", made.Answerer(0.4))
    for file in (other / "answers").glob("*.jsonl"):
        records = [json.loads(line) for line in file.read_text().splitlines()]
        lines = [json.dumps({**r, "prediction": "<script>x</script>"}) + "\n" for r in records]
        file.write_text("".join(lines))
    compare(one, other)
    text = (one / "eval-compare.html").read_text()
    assert "<script" not in text and "&lt;script&gt;" in text


def change(out: Path, **fields) -> None:
    path = out / "eval.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"benchmark": "vqav2"}, "is of benchmark 'some_package.colours', .* of 'vqav2': only answers"),
        ({"split": "val"}, "is of split 'test', .* of 'val'"),
        ({"metrics": [{"name": "vqa", "title": "", "scale": 1}]}, "scored by exact_match, .* by vqa"),
        ({"settings": []}, "no setting in common"),
        ({"config": {"benchmark": "x", "shot": 3}}, "another version .*did you mean 'shots'"),
        ({"fingerprint": "g"}, "of another model or other settings than eval.json"),
    ],
)
def test_what_cannot_be_compared_is_refused(colours, tmp_path, fields, said):
    one = made.write(tmp_path / "a", made.Answerer(0.5), shots=(0,), control_limit=0)
    other = shutil.copytree(one, tmp_path / "b")
    change(other, **fields)
    with pytest.raises(ValueError, match=said):
        compare(one, other)
    assert not (one / "eval-compare.html").exists() and not (one / "compare.json").exists()


def test_a_folder_without_an_evaluation_is_named(colours, tmp_path):
    one = made.write(tmp_path / "a", made.Answerer(0.5), shots=(0,), control_limit=0)
    with pytest.raises(ValueError, match=r"none/eval.json is not there: name the folder of a finished"):
        compare(one, tmp_path / "none")


def test_other_data_or_other_queries_are_refused(colours, tmp_path):
    one = made.write(tmp_path / "a", made.Answerer(0.5), shots=(0,), control_limit=0)
    other = shutil.copytree(one, tmp_path / "b")
    (file,) = (other / "answers").glob("*.jsonl")
    text = file.read_text()
    file.write_text(text.replace('"question": "colour 7?"', '"question": "which?"'))
    with pytest.raises(ValueError, match="other questions .* 1 times, the first is 'test7': .* other data"):
        compare(one, other)
    file.write_text(text.replace('{"id": "test', '{"id": "other'))
    with pytest.raises(ValueError, match="no query in common that has a score: take the same limit and seed"):
        compare(one, other)

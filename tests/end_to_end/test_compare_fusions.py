"""`make compare` in small: two ways trained, asked and timed, each part once; what its sentences say."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("benchmarks.compare", reason="the benchmarks lie beside the package, in the repository")

from benchmarks import compare, compare_report  # noqa: E402

SMALL = [
    "resampler_depth=1", "resampler_width=32", "resampler_heads=2", "resampler_head_dim=16",
    "cross_attention_every=1", "cross_attention_heads=2", "cross_attention_head_dim=16",
]  # fmt: skip
FIRST, SECOND = "cross-attention + perceiver", "prefix + mlp, LoRA"


@pytest.fixture(scope="module")
def words(world: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments for a comparison of two ways on the world's data."""
    data = tmp_path_factory.mktemp("data")
    (data / "backbones").mkdir()
    (data / "backbones/efficientnet-lite0").symlink_to(world / "vision")
    (data / "backbones/smollm2-135m-instruct").symlink_to(world / "language")
    (data / "easy-vqa").symlink_to(world / "shards")
    asked = [
        "--steps",
        "2",
        "--questions",
        "3",
        "--answers",
        "2",
        "--timed-steps",
        "2",
        "--rounds",
        "2",
        "--shots",
        "0",
        "2",
    ]
    own = [*(f"model.architecture.{field}" for field in SMALL), "perceiver:optimizer.lr=1e-3"]
    folders = ["--data", str(data), "--out", str(data / "compare")]
    return [*asked, *folders, "--only", "perceiver", "mlp", "--set", *own]


@pytest.fixture(scope="module")
def calls() -> list[str]:
    return []


@pytest.fixture(scope="module")
def page(words: list[str], calls: list[str], cli) -> Any:
    """The report; commands run as in other tests, and are noted."""

    def run(*given: str) -> None:
        calls.append(" ".join(given[:2]) if given[0] in ("eval", "data") else given[0])
        done = cli(*given)
        assert done.returncode == 0, done.stdout + done.stderr

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "flamingo", run)
        patch.setattr(compare, "prepare", lambda data: None)  # the world has its own
        yield compare.main(words)


@pytest.mark.slow
def test_every_way_is_trained_asked_and_timed(page: Path, calls: list[str]):
    assert calls == ["train", "eval run"] * 2 + ["data easy-vqa"] + ["train"] * 4  # two rounds, in turn
    found = json.loads((page.parent / "compare-fusions.json").read_text())
    one, other = found["ways"]
    assert (one["name"], other["name"]) == (FIRST, SECOND)
    assert (one["image_tokens"], other["image_tokens"]) == (1, 25)  # the encoder's 5 x 5 places
    for way in found["ways"]:
        assert way["steps"] == 2 and way["accuracy"] is not None and way["accuracy_image_blank"] is not None
        assert way["memory_gb"] > 0 and way["trained_parameters"] > 0
        assert way["samples_per_second"] == pytest.approx(14 / way["step_seconds"], rel=1e-3)
        assert set(way["shots"]) == {"0", "2"}
    assert one["rate_ratio"] == 1 and other["rate_ratio"] > 0
    assert one["shots"]["2"]["ratio"] == 1 and other["shots"]["2"]["ratio"] > 0
    assert other["shots"]["2"]["tokens"] == one["shots"]["2"]["tokens"] + 3 * 24  # of three pictures
    assert found["settings"]["optimizer.lr"] == [1e-3, 3e-3]
    assert found["settings"]["model.architecture.fusion"] == [None, "prefix"]


@pytest.mark.slow
def test_the_page_and_the_table_say_the_same(page: Path):
    text, table = page.read_text(), (page.parent / "compare-fusions.md").read_text()
    found = json.loads((page.parent / "compare-fusions.json").read_text())
    for sentence in found["sentences"]:
        assert sentence.replace("\u00a0", " ") in table
    assert text.count("<svg") >= 2 + 3 and "<script" not in text
    assert f"| {FIRST} | {SECOND} |" in table and "time of an answer, 2 shots" in table


@pytest.mark.slow
def test_what_is_done_is_not_done_again(page: Path, words: list[str], calls: list[str]):
    before, times = len(calls), (page.parent / "times.json").stat().st_mtime_ns
    compare.main(words)
    assert len(calls) == before and (page.parent / "times.json").stat().st_mtime_ns == times
    (page.parent / "times.json").write_text('{"of": ')  # cut off
    compare.main(words)
    assert len(calls) == before and json.loads((page.parent / "times.json").read_text())["times"]


def test_other_questions_are_asked_anew_and_an_interrupted_evaluation_goes_on(tmp_path: Path, monkeypatch):
    way, asked = compare.Way("any", tmp_path), []
    way.model.mkdir()
    (way.model / "config.json").write_text("{}")

    def run(*words: str) -> None:
        asked.append("--overwrite" in words)
        if len(asked) != 2:  # the second is interrupted
            (tmp_path / "eval.json").write_text("{}")

    monkeypatch.setattr(compare, "flamingo", run)
    for questions in (3, 3, 4, 4, 4):
        compare.evaluate(way, questions)
    assert asked == [True, True, False]


@pytest.mark.slow
def test_runs_of_other_settings_are_refused_before_anything_is_trained(
    page: Path, words: list[str], calls: list[str]
):
    before = len(calls)
    with pytest.raises(SystemExit, match=r"holds a run with other settings \(steps\): .*--out"):
        compare.main([*words, "--steps", "3"])
    with pytest.raises(SystemExit, match="'mpl' is none of perceiver, linear, mlp, frozen"):
        compare.main([*words[: words.index("--set")], "--set", "mpl:steps=3"])
    assert len(calls) == before


def made(name: str, accuracy: float, **fields: Any) -> dict[str, Any]:
    def span(share: float) -> list[float]:
        return [share - 0.01, share + 0.01]

    shots = {
        "0": {"seconds": 1.0, "ratio": 1.0, "ratio_range": [1.0, 1.0], "tokens": 12.0},
        "16": {"seconds": 2.0, "ratio": 1.0, "ratio_range": [1.0, 1.0], "tokens": 200.0},
    }
    return {
        "name": name, "steps": 600, "blind_accuracy": 0.67,
        "accuracy": accuracy, "accuracy_image_blank": 0.65,
        "intervals": {"accuracy": span(accuracy), "accuracy_image_blank": span(0.65)},
        "image_tokens": 1, "image_values": 7, "trained_parameters": 200,
        "rate_ratio": 1.0, "rate_ratio_range": [1.0, 1.0],
        "memory_gb": 2.0, "shots": shots, **fields,
    }  # fmt: skip


@pytest.fixture
def ways() -> list[dict[str, Any]]:
    other = made("B", 0.97, image_tokens=49, trained_parameters=10, memory_gb=3.0)
    other |= {"rate_ratio": 0.4, "rate_ratio_range": [0.3, 0.5]}
    other["shots"] = copy.deepcopy(other["shots"])
    other["shots"]["16"] |= {"seconds": 9.0, "ratio": 4.5, "ratio_range": [4.0, 5.0], "tokens": 1016.0}
    return [made("A", 0.98), other]


def said(ways: list[dict[str, Any]], whole: int = 600) -> str:
    return " ".join(compare_report.sentences(ways, whole)).replace("\u00a0", " ")


def test_sentences_are_of_the_figures(ways: list[dict[str, Any]]):
    text = said(ways)
    assert (
        "A answers most test questions right: 98.0 %; B (97.0 %) no fewer that is more than chance." in text
    )
    assert "A looks: blank pictures cost it 33.0 points." in text
    assert "1 token with A, 49 tokens with B" in text
    assert "From 0 to 16 shots an answer takes 2.0 times as long with A, 9.0 times as long with B" in text
    assert "At 16 shots B takes 4.50 times as long as A (4.00 to 5.00 in the rounds)." in text
    assert "B trains 5.0 % as many parameters, learns from 0.40 times as many samples a second " in text
    assert "1.50 times the memory" in text
    assert "Below" not in text and "unfinished" not in text


def test_they_change_with_the_figures(ways: list[dict[str, Any]]):
    ways[1] |= {"accuracy": 0.66}
    ways[1]["intervals"] = {**ways[1]["intervals"], "accuracy": [0.645, 0.675]}
    text = said(ways, whole=1000)
    assert "A answers most test questions right: 98.0 %; B (66.0 %) fewer." in text
    assert "Below 95.0 % in this budget: B (66.0 %)." in text
    assert "B does not look as far as this tells" in text
    assert "Trained for 600 of the quickstart's 1,000 steps" in text
    for way in ways:
        way["intervals"] = {**way["intervals"], "accuracy": [0.60, 0.68]}
    assert "None answers more than the 67.0 % possible without looking." in said(ways)
    ways[0] |= {"accuracy": None}
    ways[1] |= {"accuracy": None, "memory_gb": None}
    for way in ways:
        way["intervals"] = {"accuracy": None, "accuracy_image_blank": None}
    text = said(ways)
    assert "No test question was asked." in text and "memory" not in text and "looks" not in text

"""Figures of an evaluation: intervals that hold, sentences that are honest, a page that needs only itself."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pytest.importorskip("matplotlib")
scipy_stats = pytest.importorskip("scipy.stats")

from flamingo.eval.config import EvalConfig  # noqa: E402
from flamingo.eval.results import page, published, statistics  # noqa: E402
from flamingo.eval.results.controls import Control, Copying, controls, copying  # noqa: E402
from flamingo.eval.results.reading import Evaluation  # noqa: E402
from flamingo.eval.results.statistics import Clusters  # noqa: E402
from flamingo.eval.results.summary import copied, summarise  # noqa: E402
from flamingo.eval.task import Task  # noqa: E402
from tests.eval import made_evaluations as made  # noqa: E402

EVIL = '<script>alert("x")</script><img src=https://evil.example/x.png>'


@pytest.fixture
def colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return made.benchmark(tmp_path / "data", monkeypatch)


def figures(out: Path, name: str) -> dict:
    settings = json.loads((out / "eval.json").read_text())["settings"]
    return next(setting for setting in settings if setting["name"] == name)


# ---- statistics ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "n"), [(0, 10), (10, 10), (45, 50), (1, 2000)])
def test_wilson_is_that_of_scipy(right, n):
    expected = scipy_stats.binomtest(right, n).proportion_ci(method="wilson")
    assert statistics.wilson(right / n, n) == pytest.approx((expected.low, expected.high), abs=1e-7)


@pytest.mark.parametrize(
    ("lost", "won"), [(0, 0), (0, 6), (3, 9), (9, 3), (5, 5), (400, 460), (30000, 30500)]
)
def test_mcnemar_is_the_exact_binomial_test(lost, won):
    expected = scipy_stats.binomtest(lost, lost + won).pvalue if lost + won else 1.0
    assert statistics.mcnemar(lost, won) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("shift", [0.0, 0.08, 0.2])
@pytest.mark.parametrize("rounded", [False, True])  # few different values, many
def test_the_permutation_test_is_that_of_scipy(shift, rounded):
    drawn = np.random.default_rng(3).normal(shift, 1, 300)
    drawn = np.round(drawn) if rounded else drawn

    def distance(values, axis):
        return abs(values.mean(axis))

    asked = {"permutation_type": "samples", "alternative": "greater", "n_resamples": 9999, "rng": 0}
    expected = scipy_stats.permutation_test((drawn,), distance, vectorized=True, **asked).pvalue
    found = statistics.sign_flips(Clusters(drawn, np.ones(300)))
    assert found == pytest.approx(expected, abs=0.02)


def test_the_permutation_test_does_not_call_chance_a_difference():
    random = np.random.default_rng(0)
    ps = [
        statistics.sign_flips(Clusters(random.choice([-1.0, 0, 1], 80), np.ones(80)), 500, i)
        for i in range(300)
    ]
    assert 0.01 <= np.mean(np.array(ps) < 0.05) <= 0.09


def test_holm_is_for_all_tests_together():
    assert statistics.holm([0.01, 0.04, 0.03, 0.2]) == pytest.approx([0.04, 0.09, 0.09, 0.2])
    assert statistics.holm([0.9]) == [0.9] and statistics.holm([]) == []


@pytest.mark.parametrize("levels", [4, 100_000])  # drawn by how often each comes, by places
def test_the_bootstrap_scatters_as_the_mean_does(levels):
    values = np.random.default_rng(1).integers(0, levels, 2500) / levels
    drawn = statistics.bootstrap(Clusters(values, np.ones(2500)))
    assert drawn.std() == pytest.approx(values.std() / 50, rel=0.06)
    assert drawn.mean() == pytest.approx(values.mean(), abs=0.001)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    random = np.random.default_rng(2)
    held = 0
    for _ in range(200):
        values = random.choice([0, 1 / 3, 2 / 3, 1], p=[0.4, 0.1, 0.1, 0.4], size=150)
        low, high = statistics.interval(Clusters(values, np.ones(150)))
        held += low <= 0.5 <= high
    assert 0.90 <= held / 200 <= 0.99


def test_answers_of_one_query_with_several_seeds_are_drawn_together():
    """Three equal seeds say no more than one; a query of one seed alone counts once."""
    values = {f"q{i}": float(v) for i, v in enumerate(np.random.default_rng(0).choice([0, 0.5, 1], 300))}
    one, three = (statistics.interval(Clusters.of([values] * seeds)) for seeds in (1, 3))
    assert one == pytest.approx(three)
    uneven = Clusters.of([{"a": 1.0, "b": 0.0}, {"a": 1.0, "c": 1.0}])
    assert uneven.mean == 0.75 and len(uneven.sums) == 3


def test_no_certainty_where_everything_is_right_or_wrong():
    for value in (0.0, 1.0):
        low, high = statistics.interval(Clusters(np.full(30, value), np.ones(30)))
        assert high - low > 0.1 and low <= value <= high


def test_an_interval_of_the_whole_is_that_of_all_queries_though_resamples_are_smaller():
    values = np.random.default_rng(4).gamma(1, 1, 5000)
    spans = statistics.interval_of_whole(lambda drawn: float(values[drawn].mean()), 5000, values.mean())
    expected = 1.96 * values.std() / math.sqrt(5000)
    assert spans[1] - values.mean() == pytest.approx(expected, rel=0.2)
    assert values.mean() - spans[0] == pytest.approx(expected, rel=0.2)


# ---- eval.json -----------------------------------------------------------------------------------


def test_figures_are_means_over_seeds_with_interval_spread_and_kinds(colours, tmp_path):
    out = made.write(tmp_path / "a", made.Answerer(0.6, 0.5), trials=3, limit=60)
    found = figures(out, "4-shot")
    score = found["metrics"]["exact_match"]
    records = [
        [json.loads(line) for line in file.read_text().splitlines()]
        for file in sorted((out / "answers").glob("4-shot-seed*.0.jsonl"))
    ]
    by_seed = [np.mean([r["score"] for r in seed]) for seed in records]
    assert found["seeds"] == [0, 1, 2] and found["n"] == 60
    assert score["by_seed"] == pytest.approx(by_seed) and score["value"] == pytest.approx(np.mean(by_seed))
    assert score["spread"] == pytest.approx(np.std(by_seed, ddof=1)) and score["spread"] > 0
    assert score["interval"][0] < score["value"] < score["interval"][1]
    everything = [record for seed in records for record in seed]
    for kind in made.KINDS:
        of_kind = [r for r in everything if r["kind"] == kind]
        assert score["by_kind"][kind]["value"] == pytest.approx(np.mean([r["score"] for r in of_kind]))
        assert score["by_kind"][kind]["n"] == len({r["id"] for r in of_kind})
    share = np.mean([r["prediction"] in {s["answer"] for s in r["shots"]} for r in everything])
    assert found["copied"] == pytest.approx(share) and figures(out, "0-shot")["copied"] is None


def test_one_seed_of_right_and_wrong_has_wilsons_interval_and_no_spread(colours, tmp_path):
    score = figures(made.write(tmp_path / "a", made.Answerer(1.0)), "0-shot")["metrics"]["exact_match"]
    assert score["value"] == 1.0 and score["spread"] is None
    assert score["interval"] == pytest.approx(statistics.wilson(1.0, 80))


def test_the_same_answers_give_the_same_figures(colours, tmp_path):
    whole = [made.write(tmp_path / name, made.Answerer(0.5), trials=2) for name in "ab"]
    assert whole[0].joinpath("eval.json").read_text() == whole[1].joinpath("eval.json").read_text()


def test_a_metric_of_the_whole_has_an_interval_and_no_kinds(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    module = made.benchmark(tmp_path / "data", monkeypatch, METRICS=("roc_auc", "top1"), MAX_NEW_TOKENS=0)
    coloured = module.examples
    hateful = {"red": "yes", "green": "no", "blue": "yes", "yellow": "no"}
    module.examples = lambda data, split: [
        replace(e, answers=(hateful[e.answers[0]],)) for e in coloured(data, split)
    ]
    out = made.write(tmp_path / "a", made.Answerer(0.4), shots=(0,), control_limit=0)
    scores = figures(out, "0-shot")["metrics"]
    low, high = scores["roc_auc"]["interval"]
    assert 0 < low < scores["roc_auc"]["value"] < high <= 1 and scores["roc_auc"]["by_kind"] == {}
    assert scores["top1"]["by_kind"].keys() == set(made.KINDS)
    assert "ROC-AUC" in page.write(out).read_text()


def test_queries_without_published_answers_are_answered_and_not_scored(tmp_path, monkeypatch):
    module = made.benchmark(tmp_path / "data", monkeypatch, METRICS=("vqa",))
    coloured = module.examples
    module.examples = lambda data, split: [
        replace(e, answers=()) if split == "test" else e for e in coloured(data, split)
    ]
    out = made.write(tmp_path / "a", made.Answerer(0.5))
    found = figures(out, "4-shot")
    assert found["metrics"] == {} and found["n"] == 80 and found["copied"] is not None
    assert found["note"].startswith("80 of 80 queries have no published answer, so nothing is scored")
    text = page.write(out).read_text()
    assert "answered, not scored" in text and found["note"] in text and "not scored" in text


def test_versions_settings_and_what_was_asked_are_told(colours, tmp_path):
    found = json.loads((made.write(tmp_path / "a", made.Answerer(0.5)) / "eval.json").read_text())
    assert found["versions"].keys() >= {"flamingo-vlm", "torch", "transformers", "open_clip_torch", "python"}
    assert EvalConfig(**found["config"]).settings() and found["split"] == "test" and found["blind"] == 0.25
    assert found["metrics"] == [{"name": "exact_match", "title": "accuracy", "scale": 100.0}]


def test_an_unfinished_evaluation_has_no_figures(colours, tmp_path):
    out = made.write(tmp_path / "a", made.Answerer(0.5))
    file = next((out / "answers").glob("4-shot-seed0.0.jsonl"))
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    config = EvalConfig(benchmark=made.NAME, shots=(0, 4), zero_shot="none")
    with pytest.raises(ValueError, match="4-shot-seed0 has 79 answers to 79 questions of Colours, 80 were"):
        summarise(Task.of(config), config, out / "answers", 1.0)


def test_copies_are_of_an_answers_own_shots():
    def record(said, *shots):
        return {"prediction": said, "shots": [{"answer": shot} for shot in shots]}

    assert (
        copied([record("Red ", "red"), record("red", "blue"), record("", "x"), record("y", "x", "y")]) == 0.5
    )
    assert copied([record("red")]) is None


# ---- controls ------------------------------------------------------------------------------------


def found_controls(out: Path) -> dict[str, Control]:
    return {each.control: each for each in controls(Evaluation.read(out))}


def test_controls_of_a_model_that_sees(colours, tmp_path):
    found = found_controls(made.write(tmp_path / "a", made.Answerer(0.9)))
    blank = found["blank"]
    assert blank.verdict == 1 and blank.n == 80 and blank.cost == pytest.approx(blank.plain - blank.value)
    low, high = blank.interval
    assert low < blank.cost < high
    assert re.match(r"Blanking every picture costs \d+\.\d points \(\d+\.\d to \d", blank.sentence(100))
    # The answerer does not look at shots: their pictures cost nothing, and nothing is claimed.
    for name in ("text_only_shots", "shuffled_shots"):
        assert found[name].verdict == 0 and "nothing measurable (0.0 points" in found[name].sentence(100)


def test_controls_of_a_model_that_guesses_claim_nothing(colours, tmp_path):
    blank = found_controls(made.write(tmp_path / "a", made.Answerer(0.0)))["blank"]
    assert blank.verdict == 0 and "nothing here shows that it looks" in blank.sentence(100)


def test_a_few_pairs_are_no_proof(colours, tmp_path):
    """5 of 5 lost is p = 1/16: no test calls that a difference."""
    out = made.write(tmp_path / "a", made.Answerer(1.0), shots=(0,), limit=5)
    blank = found_controls(out)["blank"]
    assert blank.n == 5 and blank.cost >= 0.6 and blank.verdict == 0


def test_controls_on_other_queries_are_held_against_intervals(colours, tmp_path):
    """control_limit draws another sample than shots_limit: less than half are common."""
    asked = {"shots": (4,), "shots_limit": 12, "control_limit": 60}
    out = made.write(tmp_path / "a", made.Answerer(1.0), **asked)
    path = out / "answers" / "4-shot-seed0.0.jsonl"
    path.write_text(path.read_text().replace('{"id": "test', '{"id": "other'))  # no query in common
    blank = found_controls(out)["blank"]
    assert blank.n == 0 and blank.interval is None and blank.verdict == 1
    assert re.search(r"costs \d+\.\d points: the answers", blank.sentence(100))


def test_a_control_of_shots_that_were_not_asked_plainly_says_so(colours, tmp_path):
    out = made.write(tmp_path / "a", made.Answerer(0.9), control_shots=6)
    text = found_controls(out)["shuffled_shots"].sentence(100)
    assert text == (
        "6 shots as they are were not asked, so there is nothing to hold this against: add --shots 6."
    )
    assert "add --shots 6" in page.write(out).read_text()


@pytest.mark.parametrize(
    ("sight", "copies", "verdict", "said"),
    [(0.5, 0.9, 1, "it parrots"), (1.0, 0.0, 0, "no more copying"), (0.0, 0.0, 0, "no more copying")],
)
def test_copying_is_held_against_how_often_it_would_be_right(colours, tmp_path, sight, copies, verdict, said):
    out = made.write(tmp_path / "a", made.Answerer(sight, copies), shots=(2,))
    (each,) = copying(Evaluation.read(out))
    assert isinstance(each, Copying) and each.verdict == verdict and said in each.sentence()
    assert each.share == figures(out, "2-shot")["copied"]


# ---- the page ------------------------------------------------------------------------------------


def test_the_page_needs_nothing_from_outside(colours, tmp_path):
    text = page.write(made.write(tmp_path / "a", made.Answerer(0.9), trials=2)).read_text()
    assert not re.search(r"""(?:src|href)\s*=\s*["']?\s*(?:https?:)?//""", text)
    assert not re.search(r"url\((?!#)|@import|<script|<link", text)
    assert all(s.startswith("data:image/") for s in re.findall(r'src="([^"]{0,15})', text))
    assert not re.search(r"#0000(0[123]|1[1-8])\b", text), "a colour that no variable replaced"


def test_the_page_tells_all_that_was_measured(colours, tmp_path):
    out = made.write(tmp_path / "a", made.Answerer(0.9), trials=2)
    text = page.write(out).read_text().replace("&#39;", "'").replace("\u00a0", " ")
    found = json.loads((out / "eval.json").read_text())
    for setting in found["settings"]:
        score = setting["metrics"]["exact_match"]
        assert setting["name"] in text and f"<b>{100 * score['value']:.1f}</b>" in text
        assert f"{100 * score['interval'][0]:.1f} to {100 * score['interval'][1]:.1f}" in text
        assert f"± {100 * score['spread']:.1f}" in text
    zero = 100 * figures(out, "0-shot")["metrics"]["exact_match"]["value"]
    assert f"Colours: accuracy {zero:.1f} with no shots" in text
    for words in ("Without looking, 25.0 would be possible; this is more.", "✗ wrong:", "Shots before it"):
        assert words in text
    for name, version in found["versions"].items():
        assert name in text and (version or "not installed") in text
    assert "<svg" in text and "runs/x/model" in text


def test_every_setting_of_the_config_is_on_the_page():
    assert set(page.SETTINGS) | {"benchmark", "split"} == set(EvalConfig.model_fields)


def test_published_figures_are_drawn_and_sourced(colours, tmp_path, monkeypatch):
    assert set(published.FIGURES) == {"coco", "vqav2", "okvqa"}
    for benchmark in published.FIGURES:
        others = published.of(benchmark)
        assert len(others) == 9 and all(len(o.values) == len(o.shots) == 5 for o in others)
        assert all(o.family in published.SOURCES for o in others)
    assert published.of("vqav2")[5].values == (52.7, 54.8, 54.8, 54.3, 53.3)  # OpenFlamingo-9B
    out = made.write(tmp_path / "a", made.Answerer(0.9))
    assert "Flamingo-80B" not in page.write(out).read_text()
    monkeypatch.setitem(published.FIGURES, made.NAME, published.FIGURES["coco"])
    text = page.write(out).read_text()
    for words in ("Flamingo-80B", "OpenFlamingo-9B, similar shots", "IDEFICS-80B", "arXiv:2308.01390"):
        assert words in text


def test_text_of_files_is_escaped(tmp_path, monkeypatch):
    made.benchmark(tmp_path / "data", monkeypatch, TITLE=EVIL, DESCRIPTION=EVIL)
    out = made.write(tmp_path / "a", made.Answerer(0.9))
    words = [{"word": EVIL, "map": [[1.0]]}]
    shots = [{"image_png": None, "answer": EVIL}]
    evil = made.entry(question=EVIL, answer=EVIL, prediction=EVIL, kind=EVIL, words=words, shots=shots)
    (out / "gallery.json").write_text(json.dumps([evil]))
    text = page.write(out).read_text()
    assert "<script" not in text and "<img src=https" not in text and "&lt;script&gt;" in text


def test_answers_without_a_score_of_their_own_are_neither_right_nor_wrong(colours, tmp_path):
    out = made.write(tmp_path / "a", made.Answerer(0.9))
    (out / "gallery.json").write_text(json.dumps([made.entry(correct=None, score=None)]))
    text = page.write(out).read_text()
    assert "a reference says" in text and "✗ wrong" not in text and "✓ right" not in text


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("eval.json", None, "eval.json is not there: name the folder of a finished"),
        ("eval.json", "{", "eval.json is damaged"),
        ("eval.json", "{}", "has no benchmark, title, .*another version"),
        ("gallery.json", '[{"question": 1}]', "gallery.json, entry 1 is damaged"),
        ("answers/plan.json", '{"fingerprint": "g", "config": {}}', "answers are of another model or other"),
        ("answers/4-shot-seed0.0.jsonl", "", "4-shot-seed0 has 0 answers"),
    ],
)
def test_a_file_that_is_missing_or_damaged_is_named(colours, tmp_path, name, content, said):
    out = made.write(tmp_path / "a", made.Answerer(0.9))
    (out / name).unlink() if content is None else (out / name).write_text(content)
    with pytest.raises(ValueError, match=said):
        page.write(out)
    assert not (out / "eval.html").exists()


def test_without_matplotlib_the_figures_are_said_to_be_there(colours, tmp_path):
    out = made.write(tmp_path / "a", made.Answerer(0.9))
    code = (
        "import sys; sys.argv[0] = 'flamingo'; sys.modules['matplotlib'] = None\n"
        "from pathlib import Path; from flamingo.eval.results import page\n"
        "try:\n    page.write(Path(sys.argv[1]))\nexcept ValueError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=True)
    assert "needs matplotlib: pip install 'flamingo-vlm[eval]'" in done.stdout

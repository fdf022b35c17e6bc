"""Runs side by side: figures, settings that differ, and a page that needs nothing but itself."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from flamingo.eval.compare import read_records, short_names, write_comparison  # noqa: E402
from flamingo.eval.report import has_page  # noqa: E402

EVIL = '<script>alert("x")</script><img src=https://evil.example/x.png>'
STEPS = 24


def record(step: int, gap: float, **more: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "step": step,
        "loss": {"captions": 2.0 / step, "questions": 1.0},
        "lr": 1e-4 * step,
        "grad_norm": 1.2,
        "grad_norms": {"gates": 0.1, "gated_blocks": 1.0},
        "gate_attention": [0.1 * gap, -0.5],
        "gate_feed_forward": [0.4, 0.4],
        "samples": 64,
        "tokens": 800,
        "images": 96,
        "skipped": 0,
        "seconds": 2.0,
        "data_share": 0.25,
        "padding_share": 0.08,
        "memory_gb": 2.0 + step / 100,
        "flops_per_second": 3e12,
        "peak_share": 0.6,
        **{f"{name}_per_second": 32.0 for name in ("samples", "tokens", "images")},
        **more,
    }
    if step % 4 == 0:
        made["loss_blank"] = {name: loss + gap for name, loss in made["loss"].items()}
    return made


def lines(steps: int, gap: float, **more: Any) -> str:
    return "".join(json.dumps(record(step, gap, **more)) + "\n" for step in range(1, steps + 1))


def recipe(**changes: Any) -> dict[str, Any]:
    sources = [{"name": "captions", "batch": 16}, {"name": "questions", "batch": 4}]
    return {"run": "x", "steps": STEPS, "seed": 0, "optimizer": {"lr": 1e-4}, "sources": sources, **changes}


@pytest.fixture
def looks(tmp_path: Path) -> Path:
    """A run that ended, was evaluated, and looks."""
    run = tmp_path / "looks"
    run.mkdir()
    (run / "metrics.jsonl").write_text(lines(STEPS, gap=1.0))
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe()))
    train = {"steps": STEPS, "train_seconds": 100.0, "ranks": 2, "trained_parameters": 10}
    (run / "train.json").write_text(json.dumps(train))
    scores = {None: 0.97, "blank": 0.61}
    figures = {
        how: {"value": v, "interval": [v - 0.01, v + 0.01], "by_kind": {}} for how, v in scores.items()
    }
    settings = [
        {"shots": 0, "control": how, "n": 2000, "metrics": {"exact_match": each}, "copied": None}
        for how, each in figures.items()
    ]
    evaluation = {"benchmark": "easy_vqa", "seconds": 9.0, "blind": 0.67, "settings": settings}
    evaluation |= {"metrics": [{"name": "exact_match"}]}
    (run / "eval.json").write_text(json.dumps(evaluation))
    return run


@pytest.fixture
def blind(tmp_path: Path) -> Path:
    """A run that was killed while it wrote, and does not look."""
    run = tmp_path / "blind"
    run.mkdir()
    (run / "metrics.jsonl").write_text(lines(10, gap=0.0)[:-30])
    changed = recipe(optimizer={"lr": 3e-4}, pack_tokens=512)
    changed["sources"] = [{"name": "questions", "batch": 4}, {"name": "captions", "batch": 8}]
    (run / "recipe.yaml").write_text(yaml.safe_dump(changed))
    return run


def compared(*runs: Path, out: Path | None = None) -> tuple[dict[str, Any], str]:
    path = write_comparison(list(runs), out)
    assert path == (out or runs[0]) / "compare.html"
    return json.loads((path.parent / "compare.json").read_text()), path.read_text(encoding="utf-8")


def test_final_figures_of_both_runs(looks: Path, blind: Path):
    found, page = compared(looks, blind)
    one, other = found["runs"]
    assert (one["run"], other["run"]) == ("looks", "blind")
    assert (one["finished"], other["finished"]) == (True, False)
    assert (one["last_step"], other["last_step"]) == (STEPS, 9), "the last line of the other is cut off"
    beside = sum(2.0 / step for step in (8, 12, 16, 20, 24)) / 5  # the last blanked ones
    assert one["worth"] == {"captions": pytest.approx(1 / (1 + beside), abs=1e-4), "questions": 0.5}
    assert other["worth"] == {"captions": 0.0, "questions": 0.0}
    assert one["gate_attention"] == [0.1, -0.5]
    assert one["samples_per_second"] == 32.0 and one["data_share"] == 0.25
    assert one["memory_gb"] == 2.24 and other["memory_gb"] == 2.09
    assert one["accuracy"] == 0.97 and other["accuracy"] is None
    assert other["train_seconds"] is None and other["seconds_of_steps"] == 18.0
    for words in ("97.0\u00a0%", "50.0\u00a0%", "0.10 -0.50", "not finished", "3\u00a0TFLOP/s"):
        assert words in page


def test_a_run_that_goes_on_says_how_far_it_is(looks: Path, blind: Path):
    found, page = compared(looks, blind)
    assert found["runs"][0]["notes"] == []
    (note,) = found["runs"][1]["notes"]
    assert re.fullmatch(
        r"goes on, or was stopped: its last record is step 9 of 24, written 20\d\d-\d\d-\d\d \d\d:\d\d UTC",
        note,
    )
    assert note in page


def test_settings_that_differ_and_no_others(looks: Path, blind: Path):
    found, page = compared(looks, blind)
    assert found["settings"] == {
        "optimizer.lr": [1e-4, 3e-4],
        "sources.captions.batch": [16, 8],
        "pack_tokens": [None, 512],
    }
    assert "not set" in page and "sources.captions.batch" in page


def test_every_figure_that_a_run_has_is_drawn(looks: Path, blind: Path):
    _, page = compared(looks, blind)
    labels = re.findall(r'aria-label="([^"]*) over the steps"', page)
    assert labels == [
        "Loss of captions",
        "Loss of questions",
        "Worth of the images: captions",
        "Worth of the images: questions",
        "Attention gates",
        "Feed-forward gates",
        "Gradient norm",
        "Gradient norm: gates",
        "Gradient norm: gated blocks",
        "Learning rate",
        "Samples per second",
        "Tokens per second",
        "Images per second",
        "Waiting for data",
        "Padding",
        "Share of the peak",
        "Model TFLOP/s",
        "Memory",
    ]


def test_scores_while_it_trained_are_drawn(looks: Path, tmp_path: Path):
    scored = [
        record(step, 1.0, **({"scores": {"vqa": 50.0 + step}} if step % 8 == 0 else {}))
        for step in (7, 8, 16)
    ]
    (looks / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in scored))
    assert 'aria-label="Score: vqa over the steps"' in write_comparison([looks], tmp_path).read_text()


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A run of `flamingo clip train` that has ended."""
    run = tmp_path / "encoder"
    run.mkdir()
    scores = {"image_to_text": 0.5, "text_to_image": 0.4, "chance": 0.1, "pictures": 30, "captions": 10}
    told = {"accuracy": 0.25, "logit_scale": 14.2, "lr": 1e-3, "grad_norm": 1.0, "seconds": 1.0, "samples": 8}
    steps = [{"step": step, "loss": {"contrastive": 2.0 / step}, **told} for step in (1, 2, 3)]
    steps[-1]["scores"] = scores
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in steps))
    (run / "recipe.yaml").write_text(yaml.safe_dump({"run": "x", "steps": 3, "data": {"batch": 8}}))
    train = {"steps": 3, "ranks": 1, "device": "cpu", "train_seconds": 4.0}
    (run / "train.json").write_text(json.dumps({**train, "trained_parameters": 9, "frozen_parameters": 0}))
    return run


def test_one_run_of_an_encoder_has_a_page_of_its_own_figures(encoder: Path):
    assert not has_page(encoder)
    page = write_comparison([encoder]).read_text()
    assert "In nats per pair." in page and "blanked images. The distance" not in page
    assert re.findall(r'aria-label="([^"]*) over the steps"', page) == [
        "Loss of contrastive",
        "Score: image to text",
        "Score: text to image",
        "Score: chance",
        "Right captions",
        "Scale of the logits",
        "Gradient norm",
        "Learning rate",
    ]


def test_each_run_has_a_line_of_its_own_colour(looks: Path, blind: Path):
    _, page = compared(looks, blind)
    charts = re.findall(r"<svg.*?</svg>", page, flags=re.S)
    for chart in charts:
        assert "var(--series-0)" in chart and "var(--series-1)" in chart
        assert "var(--series-2)" not in chart
        assert re.findall(r">([A-H])</text>", chart) and not re.search(r"#0000[01]\d", chart)


def test_learning_rates_by_group_are_drawn_by_group(looks: Path, blind: Path):
    (blind / "metrics.jsonl").write_text(lines(5, gap=0.0, lr={"gates": 1e-3, "resampler": 1e-4}))
    _, page = compared(looks, blind)
    for title in ("Learning rate", "Learning rate: gates", "Learning rate: resampler"):
        assert f'aria-label="{title} over the steps"' in page


def test_page_needs_nothing_from_outside(looks: Path, blind: Path):
    _, page = compared(looks, blind)
    assert not re.search(r"""(?:src|href)\s*=\s*["']?\s*(?:https?:)?//""", page)
    assert not re.search(r"url\((?!#)|@import|<script|<link", page)


def test_text_from_files_is_escaped(looks: Path, blind: Path, tmp_path: Path):
    evil_name = json.dumps(EVIL)[1:-1]
    for name in ("metrics.jsonl", "recipe.yaml"):
        (blind / name).write_text((blind / name).read_text().replace("captions", evil_name))
    text = lines(9, gap=0.0, grad_norms={EVIL: 1.0}).replace("captions", evil_name)
    (blind / "metrics.jsonl").write_text(text)
    changed = {**recipe(), EVIL: EVIL, "sources": [{"name": EVIL, "batch": EVIL}]}
    (blind / "recipe.yaml").write_text(yaml.safe_dump(changed))
    renamed = tmp_path / "<script>x"
    blind.rename(renamed)
    _, page = compared(looks, renamed)
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;" in page


def test_only_metrics_are_needed(tmp_path: Path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "loss": {"x": 1.5}, "seconds": 1}\n')
    found, page = compared(tmp_path / "a", tmp_path / "b", out=tmp_path / "page")
    assert found["runs"][1]["final_loss"] == {"x": 1.5} and found["runs"][1]["gate_attention"] is None
    assert found["settings"] == {} and "the recipes are alike" in page


def test_one_run_that_was_stopped_has_a_page_too(blind: Path):
    found, page = compared(blind)
    assert len(found["runs"]) == 1 and "One run so far" in page and "nothing to compare" in page


def test_lines_that_are_no_records_are_left_out_and_named(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    good = [json.dumps(record(step, 1.0)) for step in (1, 2, 3)]
    path.write_text("\n".join([good[0], '{"step": 2, "lo', "[]", good[1], "null", good[2]]) + '\n{"st')
    records, notes = read_records(path)
    assert [r["step"] for r in records] == [1, 2, 3]
    assert notes == ["metrics.jsonl: line 2, 3, 5 is no record and left out"]


def test_of_a_step_that_is_there_twice_the_later_counts(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(4, gap=0.0) + json.dumps(record(3, 0.0, lr=7.0)) + "\n")
    records, _ = read_records(path)
    assert [(r["step"], r["lr"] == 7.0) for r in records] == [(1, False), (2, False), (3, True), (4, False)]


def test_what_is_not_finite_is_a_gap(looks: Path, blind: Path):
    odd = json.loads(lines(1, 1.0)) | {"step": 10, "step_skipped": 1, "grad_norm": None}
    odd |= {"loss": {"captions": None, "questions": 1.0}, "loss_blank": {"captions": 2.0}}
    text = json.dumps(odd | {"gate_attention": [float("nan"), 0.5]})
    (blind / "metrics.jsonl").write_text(lines(9, gap=0.0) + text + "\n")
    found, _ = compared(looks, blind)
    assert found["runs"][1]["skipped_steps"] == 1 and found["runs"][1]["last_step"] == 10
    assert found["runs"][1]["gate_attention"] == [0.0, -0.5], "of the step before"


def test_names_tell_runs_apart(tmp_path: Path):
    folders = [tmp_path / "one" / "seed0", tmp_path / "two" / "seed0"]
    assert short_names(folders) == ["one/seed0", "two/seed0"]
    assert short_names([folders[0], tmp_path / "other"]) == ["seed0", "other"]
    with pytest.raises(ValueError, match="seed0 is named twice"):
        short_names([folders[0], folders[0] / ".." / "seed0"])


def test_what_cannot_be_compared_is_named(looks: Path, tmp_path: Path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"empty/metrics.jsonl is not there: .*; name the folder"):
        write_comparison([looks, empty])
    (empty / "metrics.jsonl").write_text('{"step": 1, "lo')
    with pytest.raises(ValueError, match=r"empty/metrics.jsonl has no step yet"):
        write_comparison([looks, empty])
    with pytest.raises(ValueError, match="9 runs: a page compares 1 to 8"):
        write_comparison([tmp_path / str(number) for number in range(9)])
    assert not (looks / "compare.html").exists()


def test_same_files_same_bytes(looks: Path, blind: Path):
    first = [write_comparison([looks, blind]).read_bytes(), (looks / "compare.json").read_bytes()]
    again = [write_comparison([looks, blind]).read_bytes(), (looks / "compare.json").read_bytes()]
    assert again == first


def test_the_command_takes_one_run_or_several(looks: Path, blind: Path, tmp_path: Path):
    def run(*arguments: Any) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "flamingo.cli", "report", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    (looks / "recipe.yaml").unlink()
    assert run(looks).stdout.strip() == str(looks / "report.html")
    assert run(blind).stdout.strip() == str(blind / "compare.html"), "one that has not ended"
    done = run(looks, blind, "--out", tmp_path / "page")
    assert done.stdout.strip() == str(tmp_path / "page" / "compare.html")
    missing = run(looks, tmp_path / "nowhere")
    assert missing.returncode == 1 and missing.stderr.startswith("error: ") and "nowhere" in missing.stderr


def test_brings_no_model_code():
    code = (
        "import sys; sys.argv[0] = 'flamingo'; import flamingo.eval.compare; "
        "print([m for m in sys.modules if m in ('torch', 'transformers', 'flamingo.modeling') "
        "or m.startswith('flamingo.train')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_settings_of_a_run_that_went_on_with_others_are_told(looks: Path, blind: Path):
    changes = [(40, {"zero_stage": 2}), (1040, {"workers": 3})]
    noted = [json.dumps({"after_step": step, "settings": settings}) for step, settings in changes]
    (looks / "changes.jsonl").write_text("\n".join([*noted, "{torn"]))
    comparison, html = compared(looks, blind)
    told = ["went on after step 40 with zero_stage=2", "went on after step 1,040 with workers=3"]
    assert comparison["runs"][0]["notes"] == told and all(one in html for one in told)


def test_the_time_of_the_steps_is_told_only_where_every_step_is_recorded(looks: Path, tmp_path: Path):
    few = tmp_path / "few"
    few.mkdir()
    (few / "metrics.jsonl").write_text("".join(json.dumps(record(step, 1.0)) + "\n" for step in (5, 10)))
    comparison, _ = compared(looks, few)
    assert [run["seconds_of_steps"] for run in comparison["runs"]] == [2.0 * STEPS, None]


def test_a_short_run_is_not_hidden_by_a_long_one(tmp_path: Path):
    """The axis ends where one of the runs needs it."""
    runs = [tmp_path / "long", tmp_path / "short"]
    for run, steps, loss in zip(runs, (5000, 40), (1.0, 9.0), strict=True):
        run.mkdir()
        made = [{"step": n, "seconds": 1.0, "loss": {"captions": loss + 1 / n}} for n in range(1, steps + 1)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in made))
    _, html = compared(*runs)
    chart = re.findall(r"<svg.*?</svg>", html, re.S)[0]
    for number in range(2):
        assert re.search(rf"<path [^>]*stroke: var\(--series-{number}\)", chart), number

"""The report: figures, honest sentences, and a page that needs nothing but itself."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from flamingo.eval import findings  # noqa: E402
from flamingo.eval.report import write_report  # noqa: E402

EVIL = '<script>alert("x")</script><img src=https://evil.example/x.png>'
STEPS = 12


def record(step: int, gap: float) -> dict[str, Any]:
    seconds = 9.0 if step <= 5 else 2.0
    made: dict[str, Any] = {
        "step": step,
        "loss": {"captions": 2.0 / step, "questions": 3.0 / step},
        "lr": 1e-4,
        "grad_norm": 1.2,
        "gate_attention": [0.4, 0.5],
        "gate_feed_forward": [0.4, 0.4],
        "samples": 64,
        "tokens": 800,
        "images": 96,
        "skipped": 0,
        "seconds": seconds,
        "samples_per_second": 64 / seconds,
        "tokens_per_second": 800 / seconds,
        "images_per_second": 96 / seconds,
    }
    if step % 4 == 0:
        made["loss_blank"] = {name: loss + gap for name, loss in made["loss"].items()}
    return made


def setting(shots: int, control: str | None, n: int, accuracy: float, half: float) -> dict[str, Any]:
    by_kind = {"what color": {"n": 100, "value": accuracy}}
    interval = [accuracy - half, accuracy + half]
    return {
        "shots": shots,
        "control": control,
        "n": n,
        "metrics": {"exact_match": {"value": accuracy, "interval": interval, "by_kind": by_kind}},
        "copied": 0.375 if shots else None,
    }


def png() -> str:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (8, 8), (0, 90, 160)).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def entry(**changes: Any) -> dict[str, Any]:
    grid = [[0.5, 0.25], [0.25, 0.0]]
    return {
        "image_png": png(),
        "question": "what color?",
        "answer": "blue",
        "prediction": "red",
        "correct": False,
        "kind": "what color",
        "words": [{"word": "red", "map": grid}],
        "setting": "0-shot",
        "score": 0.0,
        "shots": [],
        **changes,
    }


def dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A run that was trained and not evaluated."""
    run = tmp_path / "first"
    run.mkdir()
    lines = [json.dumps(record(step, gap=1.0)) for step in range(1, STEPS + 1)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    train = {"steps": STEPS, "resumed_at": 0, "ranks": 2, "device": "cpu", "train_seconds": 100.0}
    dump(run / "train.json", {**train, "trained_parameters": 10, "frozen_parameters": 90})
    return run


@pytest.fixture
def complete(trained: Path) -> Path:
    settings = [
        setting(0, None, 9673, 0.972, 0.003),
        setting(0, "blank", 2000, 0.61, 0.02),
        setting(4, None, 2000, 0.96, 0.01),
        setting(4, "text_only_shots", 2000, 0.9, 0.01),
        setting(4, "shuffled_shots", 2000, 0.955, 0.01),
    ]
    evaluation = {"benchmark": "easy_vqa", "description": "easy", "seconds": 123.0}
    metrics = [{"name": "exact_match", "title": "accuracy", "scale": 100.0}]
    evaluation |= {"blind": 0.6703, "metrics": metrics, "settings": settings}
    dump(trained / "eval.json", evaluation)
    with_shots = entry(setting="4-shot", shots=[{"image_png": png(), "answer": "red"}])
    dump(trained / "gallery.json", [entry(), entry(prediction="blue", correct=True), with_shots])
    dump(trained / "timing.json", {"total_seconds": 250.5})
    (trained / "recipe.yaml").write_text(
        "run: x\nsteps: 12\nmodel: {vision: 'timm:x', language: y}\n"
        "optimizer: {lr: 1.0e-4, clip: 1.0}\n"
        "sources:\n- {name: captions, kind: pairs, batch: 16, max_tokens: 32}\n"
    )
    return trained


def report_of(run: Path) -> tuple[dict[str, Any], str]:
    page = write_report(run)
    assert page == run / "report.html"
    return json.loads((run / "report.json").read_text()), page.read_text(encoding="utf-8")


def test_figures_of_a_complete_run(complete: Path):
    report, page = report_of(complete)
    expected = {
        "accuracy": 0.972,
        "accuracy_4shot": 0.96,
        "accuracy_image_blank": 0.61,
        "accuracy_text_only_shots": 0.9,
        "accuracy_shuffled_shots": 0.955,
        "blind_accuracy": 0.6703,
        "train_seconds": 100.0,
        "eval_seconds": 123.0,
        "total_seconds": 250.5,
        "samples_per_second": 32.0,  # the first five steps are slower and left out
        "tokens_per_second": 400.0,
        "steps": STEPS,
        "step_seconds": 59.0,
        "notes": [],
    }
    assert {key: report[key] for key in expected} == expected
    assert report["intervals"]["accuracy_image_blank"] == pytest.approx([0.59, 0.63])
    assert report["by_kind"]["accuracy"] == {"what color": {"n": 100, "accuracy": 0.972}}
    assert set(report["versions"]) == {"python", "torch", "transformers", "deepspeed"}
    assert report["copied"]["accuracy_4shot"] == 0.375 and report["copied"]["accuracy"] is None
    said = " ".join(report["reading"]).replace("\u00a0", " ")
    assert "Mixing those pictures up changes nothing measurable: 95.5 %." in said
    assert "Of its answers after four demonstrations, 37.5 % are one of theirs." in said
    gap = report["final_loss_blank"]["captions"] - report["final_loss_beside_blank"]["captions"]
    assert gap == pytest.approx(1.0)
    assert "97.2\u00a0% of 9,673 test questions; 67.0\u00a0% is possible without" in report["headline"]
    assert report["headline"] in page
    assert "not measured" not in page


def test_page_needs_nothing_from_outside(complete: Path):
    _, page = report_of(complete)
    assert not re.search(r"""(?:src|href)\s*=\s*["']?\s*(?:https?:)?//""", page)
    assert not re.search(r"url\((?!#)|@import|<script|<link", page)
    sources = re.findall(r'src="([^"]{0,15})', page)
    assert len(sources) == 4  # two pictures, one word each
    assert all(source.startswith("data:image/") for source in sources)
    assert page.count("<svg") == page.count("</svg>") == 8
    assert not re.search(r"#0000(0[123]|1[1-4])\b", page), "a colour that no variable replaced"


def test_right_and_wrong_are_told_in_words(complete: Path):
    _, page = report_of(complete)
    assert "✗ wrong:" in page
    assert "✓ right:" in page


def test_what_is_missing_is_said_to_be_not_measured(trained: Path):
    report, page = report_of(trained)
    keys = ("accuracy", "accuracy_4shot", "accuracy_image_blank", "accuracy_text_only_shots")
    keys += ("accuracy_shuffled_shots",)
    for key in (*keys, "blind_accuracy", "eval_seconds", "total_seconds"):
        assert report[key] is None
    assert report["headline"].startswith("Not evaluated")
    assert page.count("not measured") >= len(keys) + 3


def test_some_settings_missing(complete: Path):
    evaluation = json.loads((complete / "eval.json").read_text())
    evaluation["settings"] = [s for s in evaluation["settings"] if not s["shots"]]
    dump(complete / "eval.json", evaluation)
    (complete / "timing.json").unlink()
    report, page = report_of(complete)
    assert report["accuracy_4shot"] is None
    assert report["accuracy_image_blank"] == 0.61
    assert report["total_seconds"] == 223.0
    assert page.count("not measured") == 3


def test_text_from_files_is_escaped(complete: Path):
    words = [{"word": EVIL, "map": [[1.0]]}]
    evil = entry(question=EVIL, answer=EVIL, prediction=EVIL, kind=EVIL, words=words)
    dump(complete / "gallery.json", [evil])
    train = json.loads((complete / "train.json").read_text())
    dump(complete / "train.json", {**train, "device": EVIL})
    lines = (complete / "metrics.jsonl").read_text()
    evil_name = json.dumps(EVIL)[1:-1]
    (complete / "metrics.jsonl").write_text(lines.replace("captions", evil_name))
    with (complete / "recipe.yaml").open("a") as file:
        file.write(f"# {EVIL}\n")
    _, page = report_of(complete)
    assert "<script" not in page
    assert "<img src=https" not in page
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize("name", ["metrics.jsonl", "train.json"])
def test_missing_file_is_named(complete: Path, name: str):
    (complete / name).unlink()
    with pytest.raises(ValueError, match=rf"{re.escape(name)} is not there: .*; .*name"):
        write_report(complete)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("metrics.jsonl", "", "is empty"),
        (
            "metrics.jsonl",
            json.dumps(record(1, 1.0)) + '\n{"step": 2, "lo',
            "line 2 .*remove the line",
        ),
        ("metrics.jsonl", '{"step": 1}', "line 1 .*train again"),
        ("metrics.jsonl", "\n".join([json.dumps(record(3, 1.0))] * 2), "step 3 follows step 3"),
        ("train.json", "[]", "is damaged .*delete it"),
        ("train.json", '{"steps": 3}', "train_seconds is None"),
        ("eval.json", "{", "is damaged"),
        ("eval.json", '{"settings": {"0-shot": {"shots": 0, "accuracy": 0.9}}}', "of another version"),
        ("eval.json", '{"settings": [{"shots": 0, "control": null}]}', "evaluate again"),
        ("recipe.yaml", "a: [", "is damaged"),
        ("gallery.json", json.dumps([entry(image_png="AAAA")]), "entry 1 is damaged"),
        ("gallery.json", json.dumps([entry(words=[{"word": "a", "map": [1]}])]), "rows x columns"),
    ],
)
def test_damaged_file_is_named(complete: Path, name: str, text: str, said: str):
    (complete / name).write_text(text)
    with pytest.raises(ValueError, match=f"{re.escape(name.split('.')[0])}.*{said}"):
        write_report(complete)
    assert not (complete / "report.html").exists()


def figures(seen: float, blank: float | None, blind: float | None, gap: float) -> dict[str, Any]:
    """What the sentences are made of; every interval is 0.02 wide."""
    shares = {"accuracy": seen, "accuracy_image_blank": blank}
    later = ("accuracy_4shot", "accuracy_text_only_shots", "accuracy_shuffled_shots")
    shares |= dict.fromkeys(later)
    spans = {key: None if v is None else [v - 0.01, v + 0.01] for key, v in shares.items()}
    losses = {"final_loss_beside_blank": {"questions": 1.0}}
    losses["final_loss_blank"] = {"questions": 1.0 + gap}
    counts = {"questions": {"accuracy": 9673}}
    copied = {"copied": dict.fromkeys(shares)}
    return {**shares, **losses, **counts, **copied, "blind_accuracy": blind, "intervals": spans}


@pytest.mark.parametrize(
    ("given", "head", "judged"),
    [
        ((0.97, 0.61, 0.67, 1.0), "67.0 % is possible without looking", "depend on the pictures"),
        ((0.66, 0.66, 0.67, 0.0), "no better than the 67.0 %", "It does not look"),
        ((0.50, 0.50, 0.67, 0.0), "worse than the 67.0 %", "It does not look"),
        ((0.50, 0.50, 0.67, 1.0), "worse than the 67.0 %", "although its losses do"),
        ((0.60, 0.50, 0.67, 1.0), "it falls to 50.0 %", "not lift it above"),
        ((0.80, 0.80, 0.67, 0.0), "it answers as many", "Unclear"),
        ((0.50, 0.60, 0.67, 0.0), "it even rises to 60.0 %", "It does not look"),
        ((0.80, None, 0.67, 1.0), "possible without looking.", "was not measured"),
        ((0.60, None, 0.67, 1.0), "worse than", "Nothing shows that it looks"),
        (
            (0.80, None, None, 0.01),
            "9,673 test questions.",
            "they are hardly higher",
        ),
        ((0.80, None, None, 1.0), "9,673 test questions.", "The losses say that it looks"),
    ],
)
def test_sentences_are_honest(given: tuple, head: str, judged: str):
    report = figures(*given)
    assert head in findings.headline(report).replace("\u00a0", " ")
    assert judged in findings.judgement(report)
    does_not = given[3] < 0.05
    assert ("there it does not look" in " ".join(findings.reading(report))) == does_not


def test_resumed_and_unfinished_runs_say_so(trained: Path):
    train = json.loads((trained / "train.json").read_text())
    dump(trained / "train.json", {**train, "steps": 20, "resumed_at": 8})
    report, page = report_of(trained)
    assert report["step_seconds"] == 8.0
    assert any("resumed after step 8" in note for note in report["notes"])
    assert any("ends at step 12 of 20" in note for note in report["notes"])
    assert all(note in page for note in report["notes"])


def test_same_files_same_bytes(complete: Path):
    first = [write_report(complete).read_bytes(), (complete / "report.json").read_bytes()]
    assert [write_report(complete).read_bytes(), (complete / "report.json").read_bytes()] == first


def test_shortest_run(trained: Path):
    (trained / "metrics.jsonl").write_text(json.dumps(record(1, 1.0)) + "\n")
    report, _ = report_of(trained)
    assert report["final_loss_blank"] == {}
    assert report["samples_per_second"] == pytest.approx(64 / 9, abs=1e-3)


def test_brings_no_model_code():
    code = (
        # As from the command line, where `import flamingo` registers nothing.
        "import sys; sys.argv[0] = 'flamingo'; import flamingo.eval.report; "
        "print([m for m in sys.modules if m in ('torch', 'transformers', 'flamingo.modeling') "
        "or m.startswith('flamingo.train')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_only_all_answers_are_a_hundred_percent_and_only_none_is_zero():
    told = {share: findings.percent(share) for share in (0, 0.00001, 0.5, 0.99949, 9671 / 9673, 1)}
    shown = [percent.replace("\u00a0", " ") for percent in told.values()]
    assert shown == ["0.0 %", "0.001 %", "50.0 %", "99.9 %", "99.98 %", "100.0 %"]

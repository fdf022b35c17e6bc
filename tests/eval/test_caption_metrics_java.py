"""METEOR and SPICE through pycocoevalcap: its figures, and what is said where something lacks."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from flamingo.eval.metrics import _ptb, meteor, spice
from tests.eval.fixtures_caption_metrics import made


@pytest.fixture(autouse=True)
def nothing_is_kept_between_calls() -> Iterator[None]:
    forget()
    yield
    forget()


def forget() -> None:
    meteor.running.cache_clear()
    meteor.counts.cache_clear()
    spice.scores.cache_clear()


@pytest.mark.skipif(shutil.which("java") is None, reason="there is no Java to run METEOR with")
def test_meteor_is_pycocoevalcaps():
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed")
    predictions, examples = made(40, seed=9)
    references = {e.id: [_ptb.tokenize(a) for a in e.answers] for e in examples}
    captions = {p.id: [_ptb.tokenize(p.text)] for p in predictions}

    def official(at: range) -> tuple[float, list[float]]:
        some = [str(n) for n in at]
        return meteor.running().compute_score(
            {n: references[n] for n in some}, {n: captions[n] for n in some}
        )

    ours = meteor.value(predictions, examples)
    theirs, each = official(range(40))
    assert ours == pytest.approx(theirs, abs=1e-9)
    assert ours != pytest.approx(sum(each) / 40, abs=1e-3), "it is not a mean"
    for half in (range(20), range(20, 40)):
        some = [predictions[n] for n in half], [examples[n] for n in half]
        assert meteor.value(*some) == pytest.approx(official(half)[0], abs=1e-9)


def test_meteor_says_when_its_process_ends_and_starts_another(monkeypatch: pytest.MonkeyPatch):
    class Ending:
        def __init__(self, script: str):
            pipe = subprocess.PIPE
            self.meteor_p = subprocess.Popen(["sh", "-c", script], stdin=pipe, stdout=pipe)

    started = iter(["read line", "exit", "read a; echo 1; read b; echo 0.25; echo 0.5"])
    monkeypatch.setattr(meteor, "scorer", lambda *_: Ending(next(started)))
    for _ in range(2):
        with pytest.raises(ValueError, match="METEOR's Java process ended at 'SCORE |||"):
            meteor.value(*made(1, seed=10))
    assert meteor.value(*made(1, seed=10)) == 0.5


@pytest.mark.parametrize("metric", [meteor, spice], ids=["meteor", "spice"])
def test_without_pycocoevalcap_the_extra_is_named(metric: ModuleType, monkeypatch: pytest.MonkeyPatch):
    for module in ("pycocoevalcap.meteor.meteor", "pycocoevalcap.spice.spice"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ValueError, match=r"needs pycocoevalcap and Java: pip install 'flamingo-vlm\[captions\]'"
    ):
        metric.value(*made(2, seed=11))


@pytest.mark.parametrize("metric", [meteor, spice], ids=["meteor", "spice"])
@pytest.mark.parametrize("there", [False, True], ids=["no java", "java that fails"])
def test_without_java_that_is_said(
    metric: ModuleType, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed")
    if there:
        (tmp_path / "java").write_text("#!/bin/sh\necho no virtual machine >&2\nexit 3\n")
        (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/nowhere")
    said = "does not run: no virtual machine" if there else "no `java` on the PATH"
    with pytest.raises(ValueError, match=said):
        metric.value(*made(2, seed=12))


@pytest.mark.parametrize("failure", [OSError("no network"), subprocess.CalledProcessError(1, "java")])
def test_spice_says_what_it_needs_where_it_fails(failure: Exception, monkeypatch: pytest.MonkeyPatch):
    class Failing:
        def compute_score(self, *_: Any) -> None:
            raise failure

    monkeypatch.setattr(spice, "scorer", lambda *_: Failing())
    with pytest.raises(ValueError, match="downloads models at its first use"):
        spice.value(*made(2, seed=13))


def test_spice_keeps_the_order_of_the_pictures(monkeypatch: pytest.MonkeyPatch):
    class Known:
        def compute_score(self, references: dict, captions: dict) -> tuple[float, list]:
            """As there: by sorted keys. The value is how many references there are."""
            return 0.0, [{"All": {"f": len(references[key]) / 10}} for key in sorted(captions)]

    monkeypatch.setattr(spice, "scorer", lambda *_: Known())
    predictions, examples = made(12, seed=14)
    assert spice.per_sample(predictions, examples) == [len(e.answers) / 10 for e in examples]
    assert spice.value(predictions, examples) == pytest.approx(sum(len(e.answers) for e in examples) / 120)

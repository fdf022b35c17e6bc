"""Every tutorial runs from its first block to its last, as printed, on models of a few layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import pytest

from flamingo.eval import session
from flamingo.folders import assemble
from tests.docs.backbones import write_backbones
from tests.docs.pages import ROOT, Walk, said

TUTORIALS = ROOT / "docs" / "tutorials"
# As the recipe of own-folder.md, which begins with this model, but for its width.
SMALL = ["resampler_depth=2", "resampler_width=16", "resampler_latents=16", "cross_attention_every=5"]
SMALL += ["cross_attention_ff_mult=2", "gate_init=0.9", "initializer_range=0.3"]

WalkPage = Callable[..., None]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `flamingo backbones` and the quickstart leave behind, in small: data/ and runs/."""
    folder = tmp_path_factory.mktemp("made")
    vision, language = write_backbones(folder / "data" / "backbones")
    model = folder / "runs" / "quickstart" / "model"
    assemble(model, f"timm:{vision}", str(language), SMALL, "float32")
    return folder


@pytest.fixture
def walk(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WalkPage:
    """walk(page, instead={...}, answers=[...]) in a new folder beside data/ and runs/quickstart."""

    def one_process(module: str, processes: int, **more: str) -> None:
        session.work(Path(more[session.SHARE]), 0, 1)

    # An evaluation's processes are tested elsewhere; starting them takes longer than all they do here.
    monkeypatch.setattr(session, "spread", one_process)
    (tmp_path / "data").symlink_to(made / "data")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(made / "runs" / "quickstart")

    def walked(page: str, instead: Mapping[str, str] | None = None, answers: Collection[str] = ()) -> None:
        Walk(TUTORIALS / page, tmp_path, monkeypatch, instead or {}, answers).run()

    return walked


def test_every_tutorial_is_walked_here():
    walked = set(re.findall(r'walk\("([\w-]+\.md)"', Path(__file__).read_text()))
    assert walked == {page.name for page in TUTORIALS.glob("*.md")}


def test_what_a_page_says_is_compared_with_what_is_said():
    assert said("step 20/200  loss 0.781", "step 2/4  loss 5")
    assert said("frozen: 137.9 M (language 2 M)", "frozen: 137 k (language 1,234)")
    assert said("documents.html: 20 documents, ... tokens", "documents.html: 4 documents, 17 tokens")
    assert not said("4 good samples; faults: none", "4 good samples; faults: 1 damaged image")
    assert not said("complete", "not compl")
    assert not said("0-shot, images blanked  181.08", "0-shot  181.08")


def test_a_page_that_says_something_else_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def walked(*written: tuple[str, str]) -> None:
        page = tmp_path / "page.md"
        page.write_text("\n".join(f"```{language}\n{code}\n```\n" for language, code in written))
        Walk(page, tmp_path, monkeypatch).run()

    walked(
        ("python", "x = 1"),
        ("python", "print(x)"),
        ("text", "1"),
        ("bash", "echo two words"),
        ("text", "words"),
    )
    walked(
        ("python", "# lab/a.py\nprint('never')"),
        ("bash", "export GREETING=hello\necho $GREETING"),
        ("text", "hello"),
    )
    assert (tmp_path / "lab" / "a.py").read_text() == "# lab/a.py\nprint('never')\n"
    for wrong, message in (
        ([("python", "print(1)"), ("text", "one")], "line 5: was not said: .'one'"),
        ([("python", "raise OSError")], "line 1: OSError"),
        ([("bash", "false")], "`false` ended with status 1"),
        ([("bash", "flamingo data verify nothing.tar")], "ended with status 1"),
        ([("sh", "true")], "a block of sh is not run"),
    ):
        with pytest.raises(AssertionError, match=message):
            walked(*wrong)


@pytest.mark.slow
def test_a_folder_of_ones_own_is_trained_on(walk: WalkPage):
    instead = {
        '("photos", 480), ("held-out", 60)': '("photos", 24), ("held-out", 4)',
        "--samples-per-shard 120": "--samples-per-shard 6",
        "steps: 200": "steps: 2",
        "steps=60": "steps=2",
        "warmup_steps: 20": "warmup_steps: 1",
        "blank_every: 10": "blank_every: 1",
        "batch: 16": "batch: 2",
        "resampler_width: 512": "resampler_width: 16",
    }
    walk("own-folder.md", instead)


def test_a_source_of_vision_encoders_is_added(walk: WalkPage):
    instead = {"cross_attention_every=5": "cross_attention_every=1", "[0, 5, 10, 15, 20, 25]": "[0, 1]"}
    walk("vision-source.md", instead)


@pytest.mark.slow
def test_a_kind_of_shards_is_added(walk: WalkPage):
    instead = {
        "steps: 60": "steps: 2",
        "warmup_steps: 5": "warmup_steps: 1",
        "blank_every: 10": "blank_every: 1",
    }
    instead |= {
        "resampler_width: 512": "resampler_width: 16",
        "cross_attention_every: 5": "cross_attention_every: 1",
    }
    walk("shard-kind.md", instead, ["What is different? green became white"])


def test_a_benchmark_is_added(walk: WalkPage):
    example = "  an example: <image>Question: what color is the shape? Answer: green<|endofchunk|>"
    walk("benchmark.md", {'40), ("test", 60)': '6), ("test", 4)'}, [example])


def test_few_shot_evaluation(walk: WalkPage):
    instead = {
        "cross_attention_every=10": "cross_attention_every=1",
        "--limit 200 --control-limit 100": "--limit 4 --control-limit 2",
        "--limit 200 --control-limit 0": "--limit 4 --control-limit 0",
        "--pool 500": "--pool 12",
        '40), ("testdev", 60)': '6), ("testdev", 4)',
    }
    verdicts = [
        line for line in (TUTORIALS / "few-shot.md").read_text().splitlines() if "than chance" in line
    ]
    walk("few-shot.md", instead, verdicts)


def test_old_weights_are_converted_checked_asked_and_evaluated(walk: WalkPage, tmp_path: Path):
    pytest.importorskip("open_flamingo", reason="pip install --no-deps open-flamingo==2.0.1 einops-exts")
    from tests.docs.old_weights import write_old

    old = write_old(tmp_path / "made")
    fetch = "hf download openflamingo/OpenFlamingo-4B-vitl-rpj3b checkpoint.pt --local-dir old"
    instead = {
        fetch: f"mkdir old\ncp {old.checkpoint} old",
        "open_clip:ViT-L-14/openai": old.vision,
        "togethercomputer/RedPajama-INCITE-Base-3B-v1": str(old.language),
        "--limit 50 --control-limit 20": "--limit 4 --control-limit 2",
    }
    walk("old-weights.md", instead)

"""Every tutorial runs from its first block to its last, as printed, on models of a few layers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from flamingo.eval import session
from flamingo.folders import assemble
from tests.docs.pages import ROOT, Walk, blocks, said
from tests.eval.harness_model import tokenizer

TUTORIALS = ROOT / "docs" / "tutorials"
SMALL = ["resampler_depth=1", "resampler_width=16", "resampler_latents=3", "cross_attention_every=1"]
SMALL += ["cross_attention_heads=2", "cross_attention_head_dim=8", "gate_init=0.9", "initializer_range=0.3"]

WalkPage = Callable[..., str]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `flamingo backbones` and the quickstart leave behind, in small: data/ and runs/."""
    folder = tmp_path_factory.mktemp("made")
    vision = folder / "data" / "backbones" / "efficientnet-lite0"
    language = folder / "data" / "backbones" / "smollm2-135m-instruct"
    vision.mkdir(parents=True)
    torch.manual_seed(0)
    weights = timm.create_model("test_efficientnet", num_classes=0).state_dict()
    save_file({k: v.contiguous() for k, v in weights.items()}, vision / "model.safetensors")
    (vision / "config.json").write_text('{"architecture": "test_efficientnet"}')
    words = tokenizer()
    words.save_pretrained(language)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    fields = {"vocab_size": len(words), "initializer_range": 0.5, "pad_token_id": 0, "eos_token_id": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, **fields, bos_token_id=None)).save_pretrained(language)  # type: ignore
    model = folder / "runs" / "quickstart" / "model"
    assemble(model, f"timm:{vision}", str(language), SMALL, "float32")
    return folder


@pytest.fixture
def walk(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WalkPage:
    """walk(page, instead={...}, answers=[...]) in a new folder beside data/ and runs/quickstart."""

    def one_process(answers: Path, processes: int) -> None:
        session.work(answers, 0, 1)

    # An evaluation's processes are tested elsewhere; starting them takes longer than all they do here.
    monkeypatch.setattr(session, "_spread", one_process)
    (tmp_path / "data").symlink_to(made / "data")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(made / "runs" / "quickstart")

    def walked(page: str, instead: Mapping[str, str] | None = None, answers: Collection[str] = ()) -> None:
        Walk(TUTORIALS / page, tmp_path, monkeypatch, instead or {}, answers).run()

    return walked  # type: ignore[return-value]


def test_every_tutorial_is_walked_here():
    source = Path(__file__).read_text()
    assert {page.name for page in TUTORIALS.glob("*.md")} == {
        page
        for page in (p.name for p in TUTORIALS.glob("*.md"))
        if f'walk("{page}"' in source.replace("\n", "")
    }


@pytest.mark.slow
def test_a_folder_of_ones_own_is_trained_on(walk: WalkPage):
    instead = {
        '("photos", 480), ("held-out", 60)': '("photos", 24), ("held-out", 4)',
        "--samples-per-shard 120": "--samples-per-shard 6",
        "steps: 200": "steps: 2",
        "warmup_steps: 20": "warmup_steps: 1",
        "blank_every: 10": "blank_every: 1",
        "batch: 16": "batch: 2",
        "resampler_width: 512": "resampler_width: 16",
    }
    walk("own-folder.md", instead)

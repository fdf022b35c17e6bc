"""The recipes of the other fusions, in small: trained, exported, evaluated, reported, asked."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from flamingo.serving.engine import Engine
from flamingo.serving.prompt import joined

RECIPES = Path(__file__).resolve().parents[2] / "train" / "recipes"
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "fusions.md").read_text()
# What makes the page's random backbones tiny.
SMALL = (
    ('"resnet50"', '"test_resnet"'),
    ("GPT2Config(", "GPT2Config(n_embd=32, n_layer=2, n_head=2, "),
)


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def done(cli, *arguments: Any) -> str:
    found = cli(*arguments)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout + found.stderr


@pytest.fixture(scope="module")
def random_backbones(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page's snippet writes into data/random, with the world's tokenizer."""
    folder = tmp_path_factory.mktemp("random")
    (folder / "data/backbones").mkdir(parents=True)
    (folder / "data/backbones/smollm2-135m-instruct").symlink_to(world / "language")
    snippet = next(code for code in re.findall(r"```python\n(.*?)```", PAGE, re.S) if "GPT2Config" in code)
    for large, small in SMALL:
        assert large in snippet
        snippet = snippet.replace(large, small)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(snippet, {})  # noqa: S102 - our own documentation
    return folder / "data/random"


@pytest.fixture(scope="module")
def basic(world: Path, random_backbones: Path, tmp_path_factory: pytest.TempPathFactory, cli) -> Path:
    """A run of resnet-gpt2.yaml as its head says for random weights."""
    run = tmp_path_factory.mktemp("basic") / "run"
    shards = world / "shards"
    # After 30 steps a model of some processors ends every answer before its first word.
    settings = [
        f"run={run}", "steps=60", "optimizer.lr=3e-3", "optimizer.warmup_steps=2", "blank_every=10",
        f"model.vision=timm:{random_backbones / 'resnet50'}", f"model.language={random_backbones / 'gpt2'}",
        "model.vision_options={image_size: 64}",
        "unfreeze=[{part: language_model}, {part: vision_encoder}]", "feature_cache_gb=0",
        "model.frozen_dtype=float32", "autocast=float32",
        f"sources.captions.shards={shards / 'pairs-*.tar'}",
        f"sources.questions.shards={shards / 'documents-*.tar'}",
    ]  # fmt: skip
    done(cli, "train", RECIPES / "resnet-gpt2.yaml", *settings, "--processes", "2")
    return run


def test_the_basic_model_learns(basic: Path):
    found = records(basic)
    first, last = (sum(r["loss"]["questions"] for r in part) / 5 for part in (found[:5], found[-5:]))
    assert last < 0.7 * first
    assert "gate_attention" not in found[0]
    assert found[0]["read_tokens"] > found[0]["tokens"] and found[0]["flops_per_second"] > 0
    assert found[0]["loss_blank"]


def test_it_is_exported_evaluated_reported_and_asked(basic: Path, tmp_path: Path, cli):
    done(cli, "export", basic, tmp_path / "model")
    done(cli, "export", tmp_path / "model", tmp_path / "trained.safetensors")
    again = load_file(tmp_path / "trained.safetensors")
    assert any("resampler.project" in name for name in again)
    options = ("--benchmark", "easy_vqa", "--shots", "0", "--shots", "2", "--limit", "6", "--beams", "1")
    done(cli, "eval", "run", tmp_path / "model", "--out", basic, *options, "--processes", "1")
    gallery = json.loads((basic / "gallery.json").read_text())
    maps = [word["map"] for entry in gallery for word in entry["words"]]
    assert maps and all(torch.tensor(m).sum() == pytest.approx(1, abs=1e-3) for m in maps)
    done(cli, "report", basic)
    page = (basic / "report.html").read_text()
    assert "Attention gates" not in page and "Loss of questions" in page
    blue, question = Image.new("RGB", (64, 64), "blue"), "Question: what color is the shape? Answer:"
    blue.save(tmp_path / "blue.png")
    asked = ("--prompt", question, "--image", tmp_path / "blue.png")
    said = done(cli, "generate", "--model", tmp_path / "model", *asked).strip()
    # So young a model may end at once: its answer is empty then, but the same wherever it is asked.
    assert said == Engine(tmp_path / "model").answer(joined([blue, question])).text.strip()


def test_the_second_stage_begins_where_the_first_ended_and_trains_the_language_model(
    world: Path, clip: Path, tmp_path: Path, cli
):
    """16 places a picture, one layer before the last, both of LLaVA's stages."""
    common = [
        f"model.vision=transformers:{clip}", f"model.language={world / 'language'}",
        "steps=2", "optimizer.warmup_steps=0", "pack_tokens=256", "workers=0", "autocast=float32",
        "model.frozen_dtype=float32", "checkpoint_every=0", "blank_every=0",
    ]  # fmt: skip
    first, second = tmp_path / "stage1", tmp_path / "stage2"
    captions = f"sources.captions.shards={world / 'shards/pairs-*.tar'}"
    stage1 = [f"run={first}", captions, "sources.captions.batch=4"]
    done(cli, "train", RECIPES / "llava-like-stage1.yaml", *common, *stage1, "--processes", "2")
    stage2 = [
        f"run={second}", f"model.start={first / 'model'}", "sources.instructions.kind=interleaved",
        "sources.instructions.options={}", "sources.instructions.max_tokens=64",
        f"sources.instructions.shards={world / 'shards/documents-*.tar'}", "sources.instructions.batch=8",
    ]  # fmt: skip
    done(cli, "train", RECIPES / "llava-like-stage2.yaml", *common, *stage2, "--processes", "2")
    config = json.loads((second / "model/config.json").read_text())
    assert config["vision_config"]["options"]["layer"] == -2 and config["connector_scale"] == 1.0
    before, after = (load_file(run / "model/model.safetensors") for run in (first, second))
    lm = load_file(world / "language/model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(before[f"language_model.{name}"], lm[name])  # stage 1 leaves it alone
    assert not torch.equal(after[f"language_model.{name}"], lm[name])
    projector = "resampler.project.0.weight"
    # Two steps of AdamW at 2e-5 from stage 1's projector; a new one would be far away.
    assert 0 < float((after[projector] - before[projector]).abs().max()) < 1e-4

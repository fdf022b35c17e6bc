"""A world in miniature: easy-VQA shards, random frozen backbones in local folders, one recipe."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from flamingo.data.easy_vqa import load_split, write_shards
from tests import warm


def environment() -> dict[str, str]:
    return {**os.environ, "NO_COLOR": "1", "COLUMNS": "200", "OMP_NUM_THREADS": "1"}


def run_cli(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """`flamingo ...` in a process that need not import first; its output as text."""
    return warm.run("flamingo.cli", *arguments, cwd=cwd, env=environment())


def language_folder(out: Path) -> Path:
    """A LLaMA of two layers that knows the words of easy-VQA."""
    texts = {e.question for split in ("train", "test") for e in load_split(split)}
    words = {w for t in texts for w in t.replace("?", " ?").split()} | {e.answer for e in load_split("test")}
    words |= {"Question:", "Answer:", "A", "photo", "of", "a"}
    vocabulary = {"<unk>": 0, "<eos>": 1, **{f"{w}": i for i, w in enumerate(sorted(words), 2)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+|(?=\?)"), "removed")  # type: ignore
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>"
    ).save_pretrained(out)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(out)
    return out


def vision_folder(out: Path) -> Path:
    """timm's smallest test network with random weights."""
    out.mkdir(parents=True)
    torch.manual_seed(0)
    weights = timm.create_model("test_efficientnet", num_classes=0).state_dict()
    save_file({k: v.contiguous() for k, v in weights.items()}, out / "model.safetensors")
    (out / "config.json").write_text('{"architecture": "test_efficientnet"}')
    return out


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tower that transformers itself loads, with random weights and 16 places a picture."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
    )
    CLIPVisionModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards, backbones and recipe.yaml."""
    folder = tmp_path_factory.mktemp("world")
    write_shards(folder / "shards", turns=2, per_shard=20, limit=40)
    source = {"max_tokens": 64, "weight": 1.0}
    recipe = {
        "run": str(folder / "run"),
        "steps": 4,
        "model": {
            "vision": f"timm:{vision_folder(folder / 'vision')}",
            "language": str(language_folder(folder / "language")),
            "frozen_dtype": "bfloat16",
            "architecture": {
                "resampler_depth": 1,
                "resampler_width": 32,
                "resampler_heads": 2,
                "resampler_head_dim": 16,
                "resampler_latents": 4,
                "cross_attention_every": 1,
                "cross_attention_heads": 2,
                "cross_attention_head_dim": 16,
                "gate_init": 0.5,
            },
        },
        "sources": [
            {**source, "name": "captions", "kind": "pairs", "batch": 4,
             "shards": str(folder / "shards/pairs-*.tar")},
            {**source, "name": "questions", "kind": "interleaved", "batch": 4,
             "shards": str(folder / "shards/documents-*.tar")},
        ],
        "optimizer": {"lr": 1e-3, "warmup_steps": 1, "schedule": "cosine"},
        "feature_cache_gb": 0.1,
        "blank_every": 2,
        "checkpoint_every": 2,
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="session")
def trained(world: Path) -> Path:
    """The run folder of the recipe, trained by the real launcher on two ranks."""
    command = [sys.executable, "-m", "flamingo.cli", "train", str(world / "recipe.yaml"), "--processes", "2"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return world / "run"


@pytest.fixture(scope="session")
def cli():
    """`flamingo ...`, see `run_cli`."""
    return run_cli

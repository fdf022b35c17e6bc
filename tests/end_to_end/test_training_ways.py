"""Adapters, unfreezing on the way and ZeRO-3 from the command line, resumed and exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flamingo.train.checkpoint import Saved

COMMON = ("blank_every=0", "checkpoint_every=0", "feature_cache_gb=0", "autocast=float32")


def losses(run: Path) -> list[dict[str, float]]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("vision", ["timm", "transformers"])
def test_adapters_under_zero_3_are_trained_and_merged_into_the_export(
    world: Path, clip: Path, tmp_path: Path, cli, vision: str
):
    run = tmp_path / "run"
    settings = (*COMMON, "model.frozen_dtype=float32", "zero_stage=3", "lora={rank: 2}", "steps=2")
    if vision == "transformers":
        settings += (f"model.vision=transformers:{clip}", "export=false", "optimizer.lr_factors={lora: 2}")
    done = cli("train", world / "recipe.yaml", f"run={run}", *settings, "--processes", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    names = Saved(run / "checkpoints" / "step-000002").names
    assert any("lora_B" in name for name in names)
    assert (run / "model").exists() == (vision == "timm")  # export=false leaves it out
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    wanted = {"lora": 2 * last["lr"], "resampler": last["lr"]} if vision == "transformers" else None
    assert wanted is None or wanted.items() <= last["lrs"].items()
    folder = {"timm": world / "vision", "transformers": clip}[vision]
    encoder = sum(value.numel() for value in load_file(folder / "model.safetensors").values())
    lm = sum(value.numel() for value in load_file(world / "language" / "model.safetensors").values())
    frozen = json.loads((run / "train.json").read_text())["frozen_parameters"]
    assert 0.5 * encoder < frozen - lm < 1.5 * encoder  # every rank has it whole, and it counts
    done = cli("export", run, tmp_path / "model")
    assert done.returncode == 0 and "after step 2" in done.stdout, done.stderr
    exported, lm = (load_file(p / "model.safetensors") for p in (tmp_path / "model", world / "language"))
    assert not any("lora" in name for name in exported)
    layer = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(exported[f"language_model.{layer}"], lm[layer])
    table = "model.embed_tokens.weight"
    assert torch.equal(exported[f"language_model.{table}"], lm[table])


def test_what_is_unfrozen_on_the_way_is_trained_from_there_and_resumed(world: Path, tmp_path: Path, cli):
    run = tmp_path / "run"
    unfreeze = "unfreeze=[{part: embeddings, start: 2}]"
    settings = (*COMMON, "model.frozen_dtype=float32", unfreeze, "steps=3", "zero_stage=1")
    arguments = ("train", world / "recipe.yaml", f"run={run}", *settings, "--processes", "2")
    done = cli(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    early, late = (Saved(run / "checkpoints" / f"step-00000{step}").names for step in (2, 3))
    (new,) = late - early
    assert new == "model.language_model.model.embed_tokens.weight"
    updates = Saved(run / "checkpoints" / "step-000003")
    assert (float(updates("step", new)), float(updates("step", "model.added_tokens.input"))) == (1, 3)
    exported, lm = (load_file(p / "model.safetensors") for p in (run / "model", world / "language"))
    table = "model.embed_tokens.weight"
    assert not torch.equal(exported[f"language_model.{table}"], lm[table])
    whole = losses(run)
    shutil.rmtree(run / "checkpoints" / "step-000003")  # goes on at the very step of the change
    done = cli(*arguments, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(run) == whole


@pytest.mark.parametrize("part", ["language_model", pytest.param("embeddings", marks=pytest.mark.slow)])
def test_what_is_unfrozen_in_half_precision_is_trained_in_pieces(world: Path, tmp_path: Path, cli, part):
    """Loaded in bfloat16 and trained in float32, under ZeRO-3 as under ZeRO-1."""
    found = []
    for stage in (1, 3):
        run = tmp_path / str(stage)
        settings = (*COMMON, f"unfreeze=[{{part: {part}}}]", "steps=3", f"zero_stage={stage}", "export=false")
        if part == "embeddings":
            settings += ("autocast=bfloat16",)
        done = cli("train", world / "recipe.yaml", f"run={run}", *settings, "--processes", "2")
        assert done.returncode == 0, done.stdout + done.stderr
        found.append(losses(run))
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, rel=1e-4 if part == "language_model" else 1e-2)


def test_other_weights_under_the_same_name_end_a_run_that_goes_on(trained: Path, world: Path, cli):
    """Once, and before anything is trained; nor is a model begun whose place holds something else."""
    weights = world / "language" / "model.safetensors"
    held = weights.read_bytes()
    try:
        save_file({name: value + 1 for name, value in load_file(weights).items()}, weights, {"format": "pt"})
        done = cli("train", world / "recipe.yaml", "--resume", "--processes", "2")
    finally:
        weights.write_bytes(held)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert "model.language: the weights are not those" in line


def test_a_place_for_the_model_that_holds_something_else_is_refused_before_training(world, tmp_path, cli):
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "model" / "notes.txt").write_text("mine")
    done = cli("train", world / "recipe.yaml", f"run={run}", "--processes", "2")
    assert done.returncode == 1 and not (run / "metrics.jsonl").exists()
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert f"{run / 'model'} holds something other than a model" in line

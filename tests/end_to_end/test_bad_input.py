"""Bad input: one clear message, exit status not 0, nothing overwritten."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from flamingo.train import checkpoint


def fails(done, *words: str) -> str:
    assert done.returncode != 0
    said = done.stdout + done.stderr
    for word in words:
        assert word in said, said
    assert "Traceback" not in said, said
    return said


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.learning_rate=1", ("optimizer.learning_rate", "known")),
        ("step=3", ("step", "steps")),
        ("steps=0", ("steps", "greater than or equal to 1")),
        ("sources.captions.kind=pears", ("pears", "pairs")),
        ("sources.caption.batch=3", ("caption", "captions")),
        ("sources.captions.shards=/nowhere/*.tar", ("/nowhere/*.tar",)),
        pytest.param("sources.captions.batch=3", ("batch", "3", "2"), marks=pytest.mark.slow),
        pytest.param("model.language=/nowhere/model", ("/nowhere/model",), marks=pytest.mark.slow),
        pytest.param("model.vision=tim:x", ("tim", "timm"), marks=pytest.mark.slow),
        ("model.architecture.latents=3", ("latents", "resampler_latents")),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_is_written(world: Path, cli, override: str, words):
    run = world / "refused"
    done = cli("train", world / "recipe.yaml", f"run={run}", override, "--processes", "2")
    fails(done, *words)
    assert not (run / "metrics.jsonl").exists() and not (run / "model").exists()
    shutil.rmtree(run, ignore_errors=True)


def test_a_run_without_one_finite_step_fails_and_exports_nothing(world: Path, tmp_path: Path, cli):
    run = tmp_path / "run"
    huge = "model.architecture.initializer_range=1e38"
    done = cli("train", world / "recipe.yaml", f"run={run}", huge, "steps=2", "--processes", "2")
    said = fails(done, "none of the 2 steps had a finite loss", "step 2/2  loss -")
    assert said.count("error (rank") == 1
    assert "step 1 left out: the loss of captions" in done.stdout and not (run / "model").exists()


def test_a_recipe_that_is_not_there_is_named(world: Path, cli):
    fails(cli("train", world / "recip.yaml"), "recip.yaml", "recipe.yaml")


def test_a_run_folder_that_holds_another_run_is_left_alone(trained: Path, world: Path, cli):
    before = (trained / "metrics.jsonl").read_bytes()
    fails(cli("train", world / "recipe.yaml"), "holds a run", "--resume", "run=")
    other = cli("train", world / "recipe.yaml", "--resume", "optimizer.lr=0.5")
    fails(other, "optimizer.lr", "0.001", "0.5", "run=")
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_a_checkpoint_from_other_settings_is_refused(trained: Path, world: Path, cli):
    run = world / "swapped"
    shutil.copytree(trained, run)
    for path in checkpoint.complete(run / "checkpoints"):
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["identity"]["seed"] = 7
        manifest["sha256"] = checkpoint._digest(manifest)
        (path / "manifest.json").write_text(json.dumps(manifest))
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace(str(trained), str(run)))
    fails(cli("train", world / "recipe.yaml", f"run={run}", "--resume"), "seed was 7, is 0")


def test_an_export_takes_the_place_of_a_model_and_of_nothing_else(trained: Path, tmp_path: Path, cli):
    before = sorted(path for path in trained.rglob("*") if path.is_file())
    (tmp_path / "notes.txt").write_text("mine")
    for place in (trained, trained.parent, tmp_path):
        fails(cli("export", trained, place), f"{place} holds something other than a model", "new or empty")
    fails(cli("export", trained, tmp_path / "notes.txt"), "is a file")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert sorted(path for path in trained.rglob("*") if path.is_file()) == before


def test_a_recipe_of_a_run_that_is_cut_off_is_named(trained: Path, world: Path, cli):
    run = world / "cut"
    run.mkdir()
    (run / "recipe.yaml").write_text((trained / "recipe.yaml").read_text()[:-40] + "{")
    done = cli("train", world / "recipe.yaml", f"run={run}", "--resume", "--processes", "2")
    fails(done, f"{run / 'recipe.yaml'} is no YAML", "run=FOLDER")


@pytest.mark.parametrize("damage", ["missing", "damaged", "text"])
def test_a_picture_that_cannot_be_read_is_named(trained: Path, tmp_path: Path, cli, damage: str):
    picture = tmp_path / "picture.png"
    if damage == "damaged":
        Image.new("RGB", (64, 64)).save(picture)
        picture.write_bytes(picture.read_bytes()[:60])
    elif damage == "text":
        picture.write_text("no picture")
    done = cli("generate", "--model", trained / "model", "--image", picture, "--prompt", "Answer:")
    fails(done, str(picture))


def test_pictures_and_image_tokens_must_match(trained: Path, cli):
    done = cli("generate", "--model", trained / "model", "--prompt", "<image>Answer:")
    fails(done, "1 <image>", "0 pictures")


def test_a_folder_without_a_model_is_named(tmp_path: Path, cli):
    fails(
        cli("eval", "run", tmp_path / "none", "--benchmark", "easy_vqa"), str(tmp_path / "none"), "no model"
    )
    fails(cli("generate", "--model", tmp_path, "--prompt", "x"), "no model")


def test_answers_of_another_model_are_not_mixed(trained: Path, tmp_path: Path, cli):
    few = ("--limit", "4", "--control-limit", "0", "--shots", "0", "--processes", "1", "--out", tmp_path)
    arguments = ("eval", "run", trained / "model", "--benchmark", "easy_vqa", *few)
    assert cli(*arguments).returncode == 0
    fails(cli(*arguments, "--seed", "1"), "other settings", "seed was 0, is 1", "--overwrite")


def test_a_folder_of_another_model_is_named_with_its_kind_by_every_command(world: Path, cli):
    llama = world / "language"
    for words in (
        ("eval", "run", llama, "--benchmark", "easy_vqa", "--out", world / "of-llama"),
        ("generate", "--model", llama, "--prompt", "x"),
        ("chat", llama),
    ):
        fails(cli(*words), f"{llama} holds a model of kind 'llama', not a Flamingo", "flamingo convert")


def test_a_look_at_the_next_image_is_refused_where_there_is_none(world: Path, cli):
    settings = ("model.architecture.fusion=prefix", "sources.questions.p_next=0.5", f"run={world / 'next'}")
    done = cli("train", world / "recipe.yaml", *settings, "--processes", "2")
    fails(done, "source 'questions': p_next=0.5", "fusion='prefix'", "set p_next=0")

"""A dual encoder that was trained here: it retrieves, open_clip loads it, and a Flamingo sees with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import open_clip
import PIL.Image
import pytest
import torch
import yaml

import flamingo
from flamingo import vision
from flamingo.config import FlamingoConfig
from flamingo.data.easy_vqa import write_shards
from flamingo.data.stream import Stream
from flamingo.folders import assemble
from flamingo.train.contrastive.config import ContrastiveRecipe, read_recipe
from flamingo.train.contrastive.held_out import recall
from tests.clip.contrastive import fields, run_through, write_pairs
from tests.end_to_end.conftest import language_folder, run_cli
from tests.train.ranks import in_ranks

RECIPE = Path(__file__).parents[2] / "train" / "contrastive" / "recipes" / "easy-vqa.yaml"
SMALL = [
    "steps=160", "data.batch=32", "data.augment=null", "optimizer.lr=2e-3", "optimizer.warmup_steps=10",
    "model.vision_cfg={image_size: 64, patch_size: 8, width: 64, head_width: 32, layers: 2}",
    "model.text_cfg={context_length: 12, width: 32, heads: 2, layers: 1}", "model.embed_dim=32",
    "checkpoint_every=0", "validation.every=0", "trackers=[]",
]  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """600 pictures of easy-VQA, the last 100 of which nobody trains on."""
    folder = tmp_path_factory.mktemp("easy-vqa") / "shards"
    write_shards(folder, limit=620, per_shard=100)
    return folder


def on(shards: Path, run: Path) -> list[str]:
    names = sorted(shards.glob("pairs-*.tar"))
    trained = "[" + ", ".join(map(str, names[:-1])) + "]"
    return [f"run={run}", f"data.shards={trained}", f"validation.shards={names[-1]}"]


@pytest.fixture(scope="module")
def encoder(shards: Path, tmp_path_factory) -> Path:
    """The folder of a small encoder, trained for half a minute by two ranks of the command."""
    run = tmp_path_factory.mktemp("clip") / "run"
    done = run_cli("clip", "train", RECIPE, *SMALL, *on(shards, run), "--processes", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "held-out after step 160: image to text" in done.stdout
    return run / "model"


def test_it_finds_captions_of_pictures_that_it_never_saw(encoder):
    """24 captions: a guess is right once in 24."""
    scores = json.loads((encoder.parent / "train.json").read_text())["held_out"]
    assert scores["captions"] >= 20 and scores["chance"] == pytest.approx(1 / scores["captions"])
    assert scores["image_to_text"] > 5 * scores["chance"]
    assert scores["text_to_image"] > 5 * scores["chance"]


def test_open_clip_loads_the_folder_and_retrieves_as_the_run_did(encoder, shards):
    model: Any
    model, prepare = open_clip.create_model_from_pretrained(f"local-dir:{encoder}")  # type: ignore[misc]
    tokenize = open_clip.get_tokenizer(f"local-dir:{encoder}")
    source = ContrastiveRecipe.model_validate(yaml.safe_load((encoder.parent / "recipe.yaml").read_text()))
    held = sorted(shards.glob("pairs-*.tar"))[-1]
    stream = Stream(source.data.model_copy(update={"shards": str(held), "augment": None}).source(), 0)
    documents = [stream[position] for position in range(stream.order.samples)]
    images = torch.stack([prepare(document.items[0].image) for document in documents])  # type: ignore[union-attr]
    captions = [document.items[1].text for document in documents]  # type: ignore[union-attr]
    distinct = sorted(set(captions))
    with torch.no_grad():
        seen = model.eval().encode_image(images, normalize=True)
        read = model.encode_text(tokenize(distinct), normalize=True)
    found = recall(seen, read, torch.tensor([distinct.index(caption) for caption in captions]))
    told = json.loads((encoder.parent / "train.json").read_text())["held_out"]
    assert found.image_to_text == pytest.approx(told["image_to_text"], abs=0.02)
    assert found.text_to_image == pytest.approx(told["text_to_image"], abs=0.05)
    assert open_clip.get_model_preprocess_cfg(model)["size"] in (64, (64, 64))


def test_a_flamingo_sees_with_it_and_is_whole_without_its_folder(encoder, tmp_path):
    copy = tmp_path / "domain-encoder"
    shutil.copytree(encoder, copy)
    language = language_folder(tmp_path / "language")
    small = ["resampler_depth=1", "resampler_latents=4", "cross_attention_every=1", "gate_init=0.5"]
    assemble(tmp_path / "model", f"open_clip:{copy}", str(language), small, "float32")
    reference: Any = open_clip.create_model_from_pretrained(f"local-dir:{copy}", return_transform=False)
    shutil.rmtree(copy)

    config: Any = FlamingoConfig.from_pretrained(tmp_path / "model").vision_config
    assert (config.name, config.image_size, config.width) == ("domain-encoder", 64, 64)
    assert list(config.grid) == [8, 8]
    assert list(config.mean) == list(open_clip.OPENAI_DATASET_MEAN)
    assert str(tmp_path) not in json.dumps(config.to_dict())
    with vision.shapes_only():
        assert next(vision.build(config).parameters()).is_meta

    model = flamingo.FlamingoForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    own = model.vision_encoder.state_dict()
    for name, value in reference.visual.state_dict().items():
        torch.testing.assert_close(own[f"model.{name}"], value)
    processor: Any = flamingo.FlamingoProcessor.from_pretrained(tmp_path / "model")
    pictures = [PIL.Image.new("RGB", (80, 64), color) for color in ("red", "blue")]
    batches = [
        processor(images=[picture], text="<image>A photo of", return_tensors="pt") for picture in pictures
    ]
    with torch.no_grad():
        red, blue = (model(**batch).logits for batch in batches)
    assert red.isfinite().all() and not torch.equal(red, blue)


def test_another_image_size_resizes_the_positions(encoder):
    source = vision.source("open_clip")
    config = source.describe(f"local-dir:{encoder}", image_size=96)
    assert list(config.grid) == [12, 12] and config.image_size == 96
    built = vision.build(config)
    source.load(built, str(encoder))
    assert built(torch.zeros(1, 3, 96, 96)).shape == (1, 144, 64)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "open_clip_config.json").unlink(), "no open_clip_config.json"),
        (lambda folder: (folder / "open_clip_config.json").write_text("{}"), "is no config of open_clip"),
        (lambda folder: (folder / "open_clip_model.safetensors").unlink(), "no weights could be read"),
        (lambda folder: (folder / "open_clip_model.safetensors").write_text("x"), "no weights could be read"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(encoder, tmp_path, damage, message):
    copy = tmp_path / "copy"
    shutil.copytree(encoder, copy)
    damage(copy)
    source = vision.source("open_clip")
    with pytest.raises(ValueError, match=message):
        source.load(vision.build(source.describe(str(copy))), str(copy))


def test_a_sigmoid_encoder_comes_back_with_its_bias(tmp_path):
    write_pairs(tmp_path / "pairs.tar", 30)
    made = fields(tmp_path, loss="siglip", steps=2)
    _, weights = in_ranks(1, tmp_path / "out", run_through, made)[0]
    again = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}/run/model", return_transform=False)
    assert torch.equal(again.logit_bias, weights["logit_bias"]) and weights["logit_bias"] < -9  # type: ignore[union-attr]


def test_the_recipe_of_the_page_is_one():
    recipe = read_recipe(RECIPE)
    assert recipe.validation and recipe.equal_captions == "match"
    assert RECIPE.read_text().startswith("# ")


@pytest.mark.slow
def test_the_recipe_of_the_page_reaches_what_the_page_says(tmp_path):
    write_shards(tmp_path / "data")
    run = tmp_path / "run"
    shards = [
        f"data.shards={tmp_path}/data/pairs-00000[0-2].tar",
        f"validation.shards={tmp_path}/data/pairs-000003.tar",
    ]
    done = run_cli("clip", "train", RECIPE, f"run={run}", *shards)
    assert done.returncode == 0, done.stdout + done.stderr
    scores = json.loads((run / "train.json").read_text())["held_out"]
    assert scores["image_to_text"] > 0.8 and scores["chance"] < 0.05

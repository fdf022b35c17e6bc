"""Tiny dual encoders with random weights, as open_clip loads them, and pictures and shards for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from click.testing import Result
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from flamingo.cli import app
from flamingo.data.writing import write_tar
from flamingo.eval.benchmarks import Example, Prediction
from flamingo.eval.config import EvalConfig
from flamingo.eval.run import answers_file
from flamingo.eval.session import Plan

CAPTIONS = ("a red circle", "two dogs on grass", "", "a blue square", "a red circle", "rain")
COLOURS = ("red", "green", "blue", "gold")
CONFIG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 1, "width": 32, "head_width": 16},
    "text_cfg": {"layers": 1, "width": 16, "heads": 1, "vocab_size": 49408, "context_length": 16},
}


def write_encoder(folder: Path, seed: int = 0, **fields: Any) -> Path:
    """A folder that open_clip loads as local-dir:FOLDER. fields: of the model's config."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, **fields}
    own = {name: value for name, value in config.items() if name not in ("vision_cfg", "text_cfg")}
    torch.manual_seed(seed)
    model = open_clip.model.CLIP(
        vision_cfg=open_clip.CLIPVisionCfg(**config["vision_cfg"]),
        text_cfg=open_clip.CLIPTextCfg(**config["text_cfg"]),
        **own,
    )
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return folder


def paint(file: Path, seed: int, colour: str = "red") -> Path:
    """Coarse noise over a colour."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    over = Image.fromarray(noise).resize((40, 40), Image.Resampling.NEAREST)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.blend(over, Image.new("RGB", (40, 40), colour), 0.3).save(file)
    return file


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"open_clip:{write_encoder(tmp_path_factory.mktemp('clip'))}"


@pytest.fixture(scope="session")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """With a bias, as sigmoid losses train it."""
    folder = tmp_path_factory.mktemp("siglip")
    return f"open_clip:{write_encoder(folder, init_logit_scale=2.3, init_logit_bias=-5.0)}"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """12 pictures, three in the folder of each colour; one has a caption beside it."""
    folder = tmp_path / "photos"
    for number in range(12):
        colour = COLOURS[number % 4]
        paint(folder / colour / f"{number}.png", number, colour)
    (folder / "red" / "0.txt").write_text("a red thing\n")
    (folder / "notes.md").write_text("no picture")
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """Two tars of five pairs each with a class; the seventh pair has no caption."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(2):
        samples = []
        for number in range(5 * shard, 5 * shard + 5):
            picture = paint(tmp_path / "made" / f"{number}.png", 50 + number).read_bytes()
            sample = {"png": picture, "cls": str(number % 4).encode()}
            sample |= {"txt": f"number {number}".encode()} if number != 7 else {}
            samples.append((f"{number:04}", sample))
        write_tar(folder / f"pairs-{shard}.tar", samples)
    return str(folder / "pairs-{0..1}.tar")


@pytest.fixture
def sides(photos) -> tuple[list[Prediction], list[Example]]:
    pictures = sorted(photos.rglob("*.png"))
    predictions = [Prediction(str(n), text) for n, text in enumerate(CAPTIONS)]
    examples = [
        Example(str(n), pictures[n], answers=(f"a thing number {n}", "a red circle"))
        for n in range(len(CAPTIONS))
    ]
    return predictions, examples


@pytest.fixture
def evaluated(sides, tmp_path) -> Path:
    """What `flamingo eval run` leaves of two seeds of COCO captions, without the pictures' data set."""
    predictions, examples = sides
    config = EvalConfig(benchmark="coco", data=tmp_path, shots=(0,), control_limit=0, trials=2)
    folder = tmp_path / "results" / "answers"
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps(Plan("model", "", config).fields()))
    for seed, setting in enumerate(config.settings()):
        records = [
            {"id": e.id, "answers": list(e.answers), "image": str(e.image), "prediction": p.text + "!" * seed}
            for p, e in zip(predictions, examples, strict=True)
        ]
        answers_file(folder, setting, 0).write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder.parent


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLAMINGO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run(*words: str | Path) -> Result:
    """`flamingo clip ...` in this process."""
    return CliRunner().invoke(app, ["clip", *map(str, words)])


def fails(done: Result, *said: str) -> None:
    """One message, status 1."""
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit), done.output
    assert done.stderr.startswith("error: ") or "\nerror: " in done.stderr
    for words in said:
        assert words in done.output, done.output


def passes(done: Result) -> str:
    """What was printed on stdout."""
    assert done.exit_code == 0, f"{done.output}{done.exception!r}"
    return done.stdout

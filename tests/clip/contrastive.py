"""Shards, recipes and runs of tiny dual encoders: for tests, and for the ranks that they start."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from flamingo.data.kinds._members import example_png
from flamingo.data.writing import write_tar
from flamingo.train import engine
from flamingo.train.contrastive.config import ContrastiveRecipe
from flamingo.train.contrastive.loop import Trained
from flamingo.train.contrastive.loss import Contrastive
from flamingo.train.contrastive.session import open_encoder, open_pairs, train
from flamingo.train.stopping import Stopped, Stopping

COLORS = {
    "red": (220, 20, 20),
    "green": (20, 200, 20),
    "blue": (20, 20, 220),
    "white": (240, 240, 240),
    "black": (10, 10, 10),
    "yellow": (230, 220, 20),
}
MODEL = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "head_width": 8, "layers": 1},
    "text_cfg": {"context_length": 8, "width": 16, "heads": 2, "layers": 1},
}


def pair(number: int) -> dict[str, bytes]:
    """A picture in one of six colours, a little lighter or darker, and its caption."""
    name, color = list(COLORS.items())[number % len(COLORS)]
    shade = number // len(COLORS) % 10
    red, green, blue = (min(255, value + shade) for value in color)
    return {"png": example_png((red, green, blue)), "txt": f"a {name} square".encode()}


def write_pairs(path: Path, count: int, bad: dict[int, dict[str, bytes]] | None = None) -> Path:
    """bad: number -> the members that a sample has instead."""
    write_tar(path, ((f"{n:04d}", (bad or {}).get(n) or pair(n)) for n in range(count)))
    return path


def fields(folder: Path, **changes: Any) -> dict[str, Any]:
    """A recipe of 6 steps on FOLDER/pairs.tar; `a__b=1` sets b of the section a."""
    made: dict[str, Any] = {
        "run": str(folder / "run"),
        "steps": 6,
        "model": dict(MODEL),
        "data": {"shards": str(folder / "pairs.tar"), "batch": 8},
        "optimizer": {"lr": 1e-2, "warmup_steps": 2},
        "autocast": "float32",
        "trackers": [],
        "checkpoint_every": 3,
        "watchdog_seconds": 0,
    }
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        (made[section] if section else made)[name] = value
    return made


def recipe(folder: Path, **changes: Any) -> ContrastiveRecipe:
    return ContrastiveRecipe.model_validate(fields(folder, **changes))


def records(run: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def run_through(given: dict[str, Any], resume: bool = False) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """In a rank: train to the end; what was recorded, and the weights that were left."""
    train(ContrastiveRecipe.model_validate(given), resume)
    folder = Path(given["run"])
    return records(folder), load_file(folder / "model" / "open_clip_model.safetensors")


def run_each(
    given: list[dict[str, Any]], resume: bool = False
) -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    with ranks_stay():
        return [run_through(one, resume) for one in given]


def ranks_stay() -> Any:
    """Within this `with`, ranks do not part after a run: they could not meet a second time at one port."""
    return mock.patch.object(engine, "leave_group")


def refused(given: list[dict[str, Any]]) -> list[str]:
    """In a rank: the words with which each of the recipes fails."""
    words = []
    for one in given:
        try:
            with ranks_stay():
                train(ContrastiveRecipe.model_validate(one))
            words.append("")
        except (ValueError, OSError) as error:
            words.append(str(error))
    return words


def asked_to_stop(given: dict[str, Any]) -> str:
    """In a rank: SIGTERM while everything is still being opened."""
    stopping = Stopping()
    os.kill(os.getpid(), signal.SIGTERM)
    try:
        train(ContrastiveRecipe.model_validate(given), stopping=stopping)
    except Stopped as why:
        return str(why)
    return ""


def gradients(given: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
    """In a rank: of each recipe, the gradients of its first step, and the mean loss."""
    found = []
    for one in given:
        made = ContrastiveRecipe.model_validate(one)
        encoder = open_encoder(made)
        rank, world = dist.get_rank(), dist.get_world_size()
        pairs = open_pairs(made, encoder, rank, world)
        trained = Trained(encoder.model, made, torch.device("cpu"), world)
        loss = Contrastive(made.loss, made.equal_captions, rank, world)
        batch = pairs[0]
        features = trained.features(batch)
        value = loss(features, batch.captions)
        value.backward()
        mean = value.detach() / world
        dist.all_reduce(mean)
        told = {name: p.grad.clone() for name, p in trained.named.items() if p.grad is not None}
        assert told.keys() == trained.named.keys()
        right = loss.right(features, batch.captions)
        dist.all_reduce(right)
        found.append({**told, "loss": mean, "right": right})
    return found

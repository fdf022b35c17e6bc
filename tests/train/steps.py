"""What ranks do in the tests of the engine: steps on rows made by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from flamingo.data.packing import packed, padded
from flamingo.train.checkpoint import Checkpoints, Saved, newest
from flamingo.train.config import Recipe
from flamingo.train.engine import Engine, sum_over_ranks
from flamingo.train.features import FeatureCache
from flamingo.train.objective import Objective
from flamingo.train.optim import trained
from flamingo.train.parts import unfreeze
from flamingo.train.precision import LossScale
from tests.train.tiny import IMAGE, make_batch, tiny_model

WEIGHTS = {"captions": 1.0, "turns": 0.3}
# (words, images) of the twelve documents of a step; the last two captions have no image.
DOCUMENTS = {
    "captions": [(6, 1), (3, 1), (9, 1), (5, 1), (4, 1), (7, 1), (5, 1), (6, 1), (3, 1), (8, 1),
                 (4, 0), (6, 0)],
    "turns": [(8, 2), (4, 3), (12, 1), (7, 2), (6, 1), (9, 1), (5, 2), (7, 1), (6, 1), (10, 2),
              (7, 0), (4, 0)],
}  # fmt: skip


def recipe(**fields: Any) -> Recipe:
    sources = [
        {"name": name, "kind": "pairs", "shards": "x.tar", "batch": 12, "max_tokens": 32, "weight": weight}
        for name, weight in WEIGHTS.items()
    ]
    given = {
        "run": "run",
        "steps": 10,
        "model": {"vision": "timm:x", "language": "x"},
        "sources": sources,
        "autocast": "float32",
        "optimizer": {"lr": 1e-2, "warmup_steps": 0, "clip": 1e9},
        **fields,
    }
    return Recipe.model_validate(given)


def micro_batches(
    step: int, rank: int, ranks: int, accumulation: int, pack: int, image_tokens: int = 1
) -> list[list]:
    """This rank's parts of a step, each as the rows of a pass: documents in order of ranks, parts."""
    size = 12 // (ranks * accumulation)
    parts = []
    for number in range(accumulation):
        first = (rank * accumulation + number) * size
        batches: list[Any] = []
        for offset, documents in enumerate(DOCUMENTS.values()):
            own = documents[first : first + size]
            start = 1000 * step + 100 * offset + first
            batches.append(make_batch([w for w, _ in own], [i for _, i in own], first=start))
        parts.append((batches, packed(batches, pack, IMAGE, image_tokens) if pack else padded(batches)))
    return parts


def engine_of(given: Recipe, step: int = 0, saved: Saved | None = None) -> Engine:
    model = tiny_model(0.05, **given.model.architecture)
    unfreeze(model, given, step)
    objective = Objective(
        model, WEIGHTS, FeatureCache(model, 0.0), getattr(torch, given.autocast), given.z_loss
    )
    world = torch.distributed.get_world_size()
    if saved:
        named = trained(objective)
        saved.check(named)
        saved.weights_into(named)
    engine = Engine(objective, given, world, LossScale.of(given.autocast))
    if saved:
        saved.moments_into(engine)
    return engine


def take_step(
    engine: Engine, given: Recipe, step: int, pack: int = 0
) -> tuple[float, dict[str, float], float]:
    """One whole step: the loss, gradient norms by group, the norm."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    parts = micro_batches(step, rank, ranks, given.accumulation, pack)
    local = [sum(part[0][i].n_targets for part in parts) for i in range(len(WEIGHTS))]
    counts = dict(zip(WEIGHTS, sum_over_ranks(torch.tensor(local)).tolist(), strict=True))
    total = torch.zeros((), dtype=torch.float64)
    for number, (_, rows) in enumerate(parts):
        loss, _ = engine(rows, counts)
        engine.backward(loss)
        total += loss.detach()
        if number + 1 < given.accumulation:
            engine.next_part()
    sum_over_ranks(total)
    norm, norms = engine.update(given.optimizer.lr)
    engine.scale.update(math.isfinite(norm))
    return float(total), norms, norm


def gradients(engine: Engine) -> dict[str, torch.Tensor]:
    """Of every trained parameter, whole, on every rank; between backward and update."""
    from deepspeed.utils import safe_get_full_grad

    found = {name: safe_get_full_grad(p) for name, p in engine.named.items()}
    return {name: grad.float().clone().cpu() / engine.scale.value for name, grad in found.items()}


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    from flamingo.train.engine import gathered

    found = {}
    for name, parameter in engine.named.items():
        with gathered([parameter]):
            found[name] = parameter.detach().float().cpu().clone()
    return found


def gradients_of_all(settings: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
    """The gradient of one step in each setting."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found = []
    for fields in settings:
        fields = dict(fields)
        pack = fields.pop("pack", 0)
        given = recipe(**fields)
        engine = engine_of(given)
        each = engine.module.model.image_tokens  # type: ignore[union-attr]
        parts = micro_batches(0, rank, ranks, given.accumulation, pack, each)  # type: ignore[arg-type]
        local = [sum(part[0][i].n_targets for part in parts) for i in range(len(WEIGHTS))]
        counts = dict(zip(WEIGHTS, sum_over_ranks(torch.tensor(local)).tolist(), strict=True))
        for number, (_, rows) in enumerate(parts):
            loss, _ = engine(rows, counts)
            engine.backward(loss)
            if number + 1 < given.accumulation:
                engine.next_part()
        whole = gradients(engine)
        _, norms = engine.update(given.optimizer.lr)
        found.append({**whole, "norms": norms})
        engine.close()
    return found


def steps_of_all(settings: list[dict[str, Any]], steps: int) -> list[Any]:
    """Losses of so many steps in each setting, and the weights at the end."""
    found = []
    for fields in settings:
        given = recipe(**fields)
        engine = engine_of(given)
        losses = [take_step(engine, given, step) for step in range(steps)]
        found.append((losses, weights(engine)))
        engine.close()
    return found


def unbroken(folder: str, fields: dict[str, Any], steps: int, cut: int, background: bool = False) -> Any:
    """(losses, weights) of a run that leaves a checkpoint at `cut`."""
    given = recipe(**fields)
    engine = engine_of(given)
    checkpoints = Checkpoints(Path(folder), given.identity(), background=background)
    losses = []
    for step in range(steps):
        if step == cut:
            checkpoints.save(engine, step)
        losses.append(take_step(engine, given, step)[0])
    checkpoints.finish()
    whole = losses, weights(engine)
    engine.close()
    return whole


def going_on(folder: str, fields: dict[str, Any], steps: int, save: bool = False) -> Any:
    """(losses, weights) from the newest checkpoint up to step `steps`."""
    given = recipe(**fields)
    path = newest(Path(folder), given.identity())
    saved = Saved(path) if path else None
    engine = engine_of(given, step=saved.step if saved else 0, saved=saved)
    first = saved.step if saved else 0
    losses = [take_step(engine, given, step)[0] for step in range(first, steps)]
    if save:
        Checkpoints(Path(folder), given.identity()).save(engine, steps)
    found = losses, weights(engine)
    engine.close()
    return found


def all_unbroken(folder: str, settings: list[dict[str, Any]], steps: int, cut: int) -> list[Any]:
    return [
        unbroken(f"{folder}/{number}", fields, steps, cut, background=bool(number % 2))
        for number, fields in enumerate(settings)
    ]


def all_going_on(folder: str, settings: list[dict[str, Any]], steps: int) -> list[Any]:
    return [going_on(f"{folder}/{number}", fields, steps) for number, fields in enumerate(settings)]

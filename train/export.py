"""From a recipe to a model, and from a run's checkpoint to a folder for `from_pretrained`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import yaml

from flamingo.checkpoints.trainables import begin_with
from flamingo.factory import Gathered, create
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.processing import FlamingoProcessor
from flamingo.runtime import dtype_of
from flamingo.train import checkpoint
from flamingo.train.checkpoint import WEIGHT, Saved
from flamingo.train.config import RECIPE, Recipe
from flamingo.train.parts import add_adapters, architecture, merge_adapters, unfreeze
from flamingo.written import check_place, compare, replacing


def assemble(
    recipe: Recipe,
    gathered: Gathered | None = None,
    loading: AbstractContextManager[Any] | None = None,
) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """The model that a recipe begins with, its adapters in place; gathered, loading: see `create`."""
    model, processor = create(
        vision=recipe.model.vision,
        language=recipe.model.language,
        vision_options=recipe.model.vision_options,
        frozen_dtype=dtype_of(recipe.model.frozen_dtype),
        seed=recipe.seed,
        gathered=gathered,
        loading=loading,
        **architecture(recipe),
    )
    if recipe.model.start:
        begin_with(model, recipe.model.start)
    if recipe.lora:
        add_adapters(model, recipe.lora)
    return model, processor


@torch.no_grad()
def export_run(run: Path, out: Path) -> int:
    """Write the model of a run's newest checkpoint, in the dtype of its frozen part; its step.

    Adapters are merged into the LM. The folder is complete or absent; a model that is there is
    replaced. What was written is read again and compared.

    Raises ValueError for a folder without a run or a checkpoint, and where `out` holds something
    other than a model.
    """
    check_place(out)
    held = run / RECIPE
    if not held.is_file():
        raise ValueError(f"{run} holds no run (no {RECIPE}): name the folder of a training run")
    recipe = Recipe.model_validate(yaml.safe_load(held.read_text()))
    path = checkpoint.newest(run / "checkpoints", None)
    if path is None:
        raise ValueError(f"{run} has no checkpoint yet: train first")
    saved = Saved(path)
    model, processor = assemble(recipe)
    unfreeze(model, recipe, saved.step - 1)
    named = {f"model.{name}": p for name, p in model.named_parameters() if p.requires_grad}
    saved.check(named)
    for name, parameter in named.items():
        parameter.copy_(saved(WEIGHT, name))
    if recipe.lora:
        merge_adapters(model)
    model.to(dtype_of(recipe.model.frozen_dtype))  # type: ignore[arg-type]
    _replace(model, processor, out)
    return saved.step


def _replace(model: FlamingoForConditionalGeneration, processor: FlamingoProcessor, out: Path) -> None:
    with replacing(out) as part:
        model.save_pretrained(part)
        processor.save_pretrained(part)
        dtype = next(model.parameters()).dtype
        again = FlamingoForConditionalGeneration.from_pretrained(part, dtype=dtype)
        compare(part, model.state_dict(), again.state_dict())

"""Memory of a rank by kind: states by what DeepSpeed keeps, activations by running the objective on
shapes.

P trained parameters (float32), N ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flamingo.data.packing import Rows, packed, padded
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.runtime import dtype_of
from flamingo.train.config import Recipe
from flamingo.train.engine import configuration
from flamingo.train.features import AT_ONCE, FeatureCache
from flamingo.train.objective import Objective
from flamingo.train.planning.batches import images_per_document, micro_batch
from flamingo.train.planning.shapes import Shapes, to_shapes

FLOAT = 4  # bytes
# DeepSpeed's defaults (zero_optimization), for what the recipe's `deepspeed` does not say.
DEFAULTS = {"reduce_bucket_size": 5e8, "stage3_max_live_parameters": 1e9, "contiguous_gradients": True}


@dataclass(frozen=True)
class States:
    """Bytes that a rank holds whatever its batch is. On the accelerator: frozen and trained weights,
    gradients, the optimizer, and DeepSpeed's buffers (buckets for reduction; under ZeRO-3 weights
    that are whole for a while). host: in the CPU's memory instead."""

    frozen: int
    trained: int
    gradients: int
    optimizer: int
    buffers: int
    host: int

    @property
    def total(self) -> int:
        """On the accelerator."""
        return self.frozen + self.trained + self.gradients + self.optimizer + self.buffers


def states(
    recipe: Recipe, stage: int, ranks: int, accumulation: int, frozen: int, count: int, encoder: int = 0
) -> States:
    """What DeepSpeed 0.19 keeps in its float32 mode, which the engine uses.

    frozen: bytes of what is not trained; encoder: those of them that every rank holds whole under
    ZeRO-3 and offloading, the encoder's; count: P. ZeRO-1 and 2 keep the weights of their share a
    second time, as the optimizer's own; ZeRO-3 too. Without ZeRO the optimizer has the weights
    themselves. ZeRO-1 keeps whole gradients between micro-batches.
    """
    zero = {**DEFAULTS, **configuration(recipe, ranks).get("zero_optimization", {})}
    whole, share = FLOAT * count, FLOAT * count // ranks
    if stage == 0:
        return States(frozen, whole, whole, 2 * whole, 0, 0)
    double = 2 if zero.get("overlap_comm", stage == 3) and stage < 3 else 1
    buffers = int(zero["reduce_bucket_size"]) * FLOAT * double if zero["contiguous_gradients"] else 0
    gradients = whole if stage == 1 and accumulation > 1 else share
    weights = (frozen, whole)
    if stage == 3:
        pieces = frozen - encoder
        weights = (encoder + pieces // ranks, share)
        live = min(1.0, float(zero["stage3_max_live_parameters"]) / max(1, count + pieces // 2))
        buffers += int(live * (pieces + whole))
    optimizer, host = 3 * share, 0
    if recipe.offload != "none":
        gradients, optimizer, host = 0, 0, gradients + optimizer + share
    if recipe.offload == "all":
        weights, host = (encoder, 0), host + sum(weights) - encoder
    return States(weights[0], weights[1], gradients, optimizer, buffers, host)


@dataclass(frozen=True)
class Batchwise:
    """Bytes that grow with the micro-batch. activations: what the forward pass keeps for the backward
    pass; buffers: what is needed besides at the fullest moment: pictures, the encoder's own, logits
    and their gradients, layers that are computed again."""

    activations: int
    buffers: int


class Tracer:
    """Runs the training objective on shapes, for micro-batches of any size."""

    def __init__(self, model: FlamingoForConditionalGeneration, recipe: Recipe, images: Mapping[str, int]):
        """model: of `assembly.assemble`; from here on it consists of shapes."""
        self.model, self.recipe, self.images, self.fake = model, recipe, images, FakeTensorMode()
        # Asked once, of an LM made for that (`Decoder.hands_on_logits`), which is no part of a step.
        _ = model.skips_logits
        to_shapes(model, self.fake)
        for parameter in model.parameters():
            if parameter.requires_grad:  # gradients are counted with the states
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        weights = {source.name: source.weight for source in recipe.sources}
        cache = _Stored(model) if recipe.features else FeatureCache(model, 0, AT_ONCE)  # as on a GPU
        autocast = dtype_of(recipe.autocast)
        self.objective = Objective(model, weights, cache, autocast, recipe.z_loss)

    def run(self, parts: int) -> Batchwise:
        """The micro-batch when a step's samples are cut into so many parts, over ranks and
        accumulation."""
        shapes = Shapes(self.fake)
        with shapes:
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                shapes.see(tensor)
            before = shapes.live
            rows = self._rows(parts)
            targets = {source.name: source.batch * source.max_tokens for source in self.recipe.sources}
            loss, _ = self.objective(rows, targets)
            inputs = sum(row.pixel_values.untyped_storage().nbytes() for row in rows)
            kept = shapes.live - before - inputs
            loss.backward()
        return Batchwise(kept, shapes.peak - before - kept)

    def _rows(self, parts: int) -> list[Rows]:
        config, stored = self.model.config, bool(self.recipe.features)
        batches = [
            micro_batch(
                source,
                source.batch // parts,
                images_per_document(source, self.images),
                config,
                stored,
                self.fake,
            )
            for source in self.recipe.sources
        ]
        if self.recipe.pack_tokens and self.model._takes_positions:  # as `packs()` asks first
            return packed(batches, self.recipe.pack_tokens, config.image_token_id, self.model.image_tokens)
        return padded(batches)


class _Stored(FeatureCache):
    """Grids that come from disk."""

    def __init__(self, model: Any):
        super().__init__(model, limit_gb=0)

    def grids(self, rows: Rows) -> Tensor:
        vision: Any = self.model.config.vision_config
        dtype = next(self.model.vision_encoder.parameters()).dtype  # type: ignore[union-attr]
        places = vision.grid[0] * vision.grid[1]
        return torch.empty(len(rows.image_keys), places, vision.width, dtype=dtype)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None

"""What a run needs, before it is paid for: parameters, memory per rank, FLOPs, time, GPU-hours.

The model is assembled on the meta device from configs, and the training objective is run on shapes:
no weight is read, nothing large is allocated. docs/recipes.md says how far to trust the result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from pydantic import ValidationError

from flamingo.train import flops
from flamingo.train.config import Recipe
from flamingo.train.planning.assembly import assemble, bytes_of, parameters
from flamingo.train.planning.batches import (
    Held,
    check_images,
    held_by_step,
    images_per_document,
    splits,
)
from flamingo.train.planning.memory import Batchwise, States, Tracer, states

GIB = 2**30
# Share of the memory that a plan fills: the rest is the driver's, the communication's and lost to
# fragmentation.
ROOM = 0.92
MOST = 5  # micro-batches that are tried
# NVIDIA's data sheet of the A100 (2021): dense products, TFLOP/s.
A100 = {"bfloat16": 312.0, "float16": 312.0, "float32": 19.5}


@dataclass(frozen=True)
class Option:
    """One ZeRO stage with one micro-batch; bytes of a rank.

    documents: in a micro-batch of a rank, of all sources; fits: within `ROOM` of the memory.
    """

    zero_stage: int
    accumulation: int
    documents: int
    states: States
    batch: Batchwise
    fits: bool

    @property
    def total(self) -> int:
        """On the accelerator, at the fullest moment."""
        return self.states.total + self.batch.activations + self.batch.buffers


@dataclass(frozen=True)
class Plan:
    """frozen, trained: parameters by part and by group; held: what a step of all ranks holds; flops:
    of the model in a step; recomputed: those that activation checkpointing adds; peak: FLOP/s of one
    GPU; step_seconds, gpu_hours: of the whole run, at `utilisation` of the peak."""

    gpus: int
    gpu_memory: float
    frozen: dict[str, int]
    trained: dict[str, int]
    images: dict[str, int]
    held: Held
    flops: float
    recomputed: float
    peak: float
    peak_from: str
    utilisation: float
    steps: int
    step_seconds: float
    gpu_hours: float
    options: list[Option]
    recommended: Option | None
    advice: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Everything as plain fields; memory in bytes."""
        fields = asdict(self)
        totals = [option.total for option in self.options]
        for option, total in zip(fields["options"], totals, strict=True):
            option["total"] = total
        if self.recommended:
            fields["recommended"] |= {"total": self.recommended.total}
        return fields


def plan(
    recipe: Recipe,
    *,
    gpus: int,
    gpu_memory: float,
    utilisation: float = 0.4,
    peak: float | None = None,
    images: Mapping[str, int] | None = None,
) -> Plan:
    """Plan a recipe on so many GPUs of so many GiB.

    utilisation: share of the peak that the run will reach; peak: TFLOP/s of a GPU (None: measured
    here, without a GPU an A100's); images: <image> tokens of a document, by source.

    Raises ValueError for backbones whose configs cannot be read, for batches that the ranks do not
    divide, and for numbers that cannot be.
    """
    _check(gpus, gpu_memory, utilisation, peak)
    recipe = recipe.settled("bfloat16", "bfloat16")  # what `auto` is on a GPU
    images = dict(images or {})
    check_images(recipe, images)
    parts = _spread(splits(recipe, gpus), recipe.accumulation)
    model = assemble(recipe)
    frozen, trained = parameters(model)
    frozen_bytes, count = bytes_of(model, trained=False), sum(trained.values())
    held = held_by_step(recipe, model.config, images, model.image_tokens)
    work = flops.step_flops(model, **asdict(held))
    again = flops.step_flops(model, **asdict(held), recomputed=True) - work
    again = again if recipe.activation_checkpointing else 0.0
    speed, speed_from = _peak(recipe, peak)
    seconds = (work + again) / (gpus * speed * utilisation)
    sizes = frozen_bytes, count, bytes_of(model.vision_encoder, trained=False)  # type: ignore[arg-type]
    options = _options(recipe, Tracer(model, recipe, images), parts, gpus, gpu_memory, sizes)
    best = recommend(options)
    return Plan(
        gpus=gpus,
        gpu_memory=gpu_memory,
        frozen=frozen,
        trained=trained,
        images={source.name: images_per_document(source, images) for source in recipe.sources},
        held=held,
        flops=work,
        recomputed=again,
        peak=speed,
        peak_from=speed_from,
        utilisation=utilisation,
        steps=recipe.steps,
        step_seconds=seconds,
        gpu_hours=seconds * recipe.steps * gpus / 3600,
        options=options,
        recommended=best,
        advice=[] if best else _advice(recipe, options, gpus),
    )


def recommend(options: Sequence[Option]) -> Option | None:
    """The largest micro-batch that fits, with the least that is shared out; ZeRO-3, which sends the
    weights in every micro-batch, only where nothing else fits. None: nothing does."""
    fitting = [option for option in options if option.fits]
    return min(fitting, key=lambda o: (o.zero_stage == 3, o.accumulation, o.zero_stage), default=None)


def _options(
    recipe: Recipe,
    tracer: Tracer,
    parts: list[int],
    gpus: int,
    gpu_memory: float,
    sizes: tuple[int, int, int],
) -> list[Option]:
    """Every ZeRO stage that the recipe may have with micro-batches from the smallest on, until one fits
    nowhere. sizes: the last arguments of `states`."""
    stages = _stages(recipe)
    room, found = ROOM * gpu_memory * GIB, []
    for accumulation in parts:
        batch = tracer.run(gpus * accumulation)
        documents = sum(source.batch for source in recipe.sources) // (gpus * accumulation)
        for stage in stages:
            held = states(recipe, stage, gpus, accumulation, *sizes)
            fits = held.total + batch.activations + batch.buffers <= room
            found.append(Option(stage, accumulation, documents, held, batch, fits))
        if not any(option.fits for option in found[-len(stages) :]):
            break
    return found


def _stages(recipe: Recipe) -> list[int]:
    """Those that a training of the recipe would not refuse."""
    found = []
    for stage in range(4):
        with suppress(ValidationError):
            Recipe.model_validate({**recipe.model_dump(), "zero_stage": stage})
            found.append(stage)
    return found


def _spread(parts: list[int], own: int) -> list[int]:
    """At most MOST of them, the first and the last included, and the recipe's own beside."""
    if len(parts) <= MOST:
        return parts
    step = (len(parts) - 1) / (MOST - 1)
    chosen = {parts[round(number * step)] for number in range(MOST)} | {own}
    return [part for part in parts if part in chosen]


def _peak(recipe: Recipe, peak: float | None) -> tuple[float, str]:
    if peak is not None:
        return peak * 1e12, "given"
    if torch.cuda.is_available():
        return flops.measured_peak("cuda", getattr(torch, recipe.autocast)), "measured here"
    return A100[recipe.autocast] * 1e12, "an A100's data sheet"


def _advice(recipe: Recipe, options: Sequence[Option], gpus: int) -> list[str]:
    """What to change where nothing fits, the cheapest first."""
    states, batch = min(option.states.total for option in options), options[0].batch
    ways = []
    if not recipe.activation_checkpointing and batch.activations > states / 4:
        ways.append("activation_checkpointing=true computes activations again instead of keeping them")
    if batch.buffers > states / 4:
        ways.append("smaller sources.NAME.max_tokens need fewer logits at once")
    if any(option.states.buffers > option.states.total / 4 for option in options):
        ways.append(
            "smaller buffers: deepspeed.zero_optimization.reduce_bucket_size and stage3_max_live_parameters"
        )
    if recipe.offload != "all":
        ways.append("offload=optimizer (ZeRO 1 to 3) or offload=all (ZeRO 3) uses the CPU's memory")
    if recipe.model.frozen_dtype == "float32":
        ways.append("model.frozen_dtype=bfloat16 halves the frozen part")
    return [*ways, f"more than {gpus} GPUs share out more"]


def _check(gpus: int, gpu_memory: float, utilisation: float, peak: float | None) -> None:
    if gpus < 1:
        raise ValueError(f"--gpus {gpus}: must be at least 1")
    if not 0 < gpu_memory < math.inf:
        raise ValueError(f"--gpu-memory {gpu_memory:g}: must be above 0, in GiB, e.g. 80")
    if not 0 < utilisation <= 1:
        raise ValueError(f"--utilisation {utilisation:g}: a share of the peak, above 0 and at most 1")
    if peak is not None and not 0 < peak < math.inf:
        raise ValueError(f"--peak {peak:g}: must be above 0, in TFLOP/s, e.g. 312")

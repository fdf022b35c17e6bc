"""The only door to DeepSpeed's engine, with `checkpoint.py`.

Works with and without a launcher: one process alone is a group of one.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from flamingo.train.config import Recipe
from flamingo.train.optim import adamw


def join_group() -> tuple[int, int]:
    """Join the process group that the launcher announced: (rank, world size)."""
    import deepspeed

    if not torch.cuda.is_available():
        # On a CPU, DeepSpeed compiles a shared-memory op that training never calls: that would
        # need a compiler, and half a minute at the first start.
        deepspeed.ops.__compatible_ops__ = {}  # type: ignore[attr-defined]
    for name, alone in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, alone)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29511")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(
        "nccl" if torch.cuda.is_available() else "gloo", auto_mpi_discovery=False, verbose=False
    )
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def leave_group() -> None:
    """Part in order, so that no rank waits for one that has gone."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def device() -> torch.device:
    """This rank's accelerator, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def wrap(objective: nn.Module, recipe: Recipe, world_size: int) -> Any:
    """The DeepSpeed engine around the objective, its configuration derived from the recipe.

    Weights of the trained part stay float32 (autocast does the rest), so DeepSpeed's own
    mixed precision is off: it would cast the frozen part too, and keep a copy of everything.
    """
    import deepspeed

    batch = sum(source.batch for source in recipe.sources)
    config = {
        # DeepSpeed insists on these; `Objective` normalises by target tokens instead.
        "train_batch_size": batch - batch % (world_size * recipe.accumulation)
        or world_size * recipe.accumulation,
        "gradient_accumulation_steps": recipe.accumulation,
        # Without ZeRO the engine does not tell the norm that it clips: `clip_and_step` does.
        "gradient_clipping": recipe.optimizer.clip if recipe.zero_stage else 0.0,
        "zero_optimization": {"stage": recipe.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 30,
    }
    engine, *_ = deepspeed.initialize(
        model=objective, optimizer=adamw(objective, recipe.optimizer), config=config
    )
    return engine


def clip_and_step(engine: Any, recipe: Recipe) -> float:
    """The one clipping and the one update of a step; the norm before clipping.

    The gradients are already summed over the ranks, so all ranks clip alike.
    """
    if recipe.zero_stage:
        engine.step()
        return float(engine.get_global_grad_norm())
    trained = [p for p in engine.module.parameters() if p.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(trained, recipe.optimizer.clip)
    engine.step()
    return float(norm)


def gather_objects(value: Any) -> list[Any]:
    """What every rank has, in the order of ranks, on every rank."""
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The same vector on every rank: the sum of all ranks' vectors."""
    torch.distributed.all_reduce(values)
    return values

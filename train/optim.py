"""AdamW, its parameter groups, and the learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from flamingo.train.config import AdamWConfig, OptimizerConfig


def group_of(name: str, in_tables: bool = False) -> str:
    """The group (`config.Group`) of a trained parameter, by its name in the model.

    in_tables: it is one of the LM's own embedding tables, unfrozen.
    """
    if "lora_" in name:
        return "lora"
    if name.endswith(("attn_gate", "ff_gate")):
        return "gates"
    if in_tables or "added_tokens." in name:
        return "embeddings"
    rooms = ("gated_blocks", "resampler", "language_model", "vision_encoder")
    return next(room for room in rooms if f"{room}." in name)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """name -> parameter of all that is trained, each once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Trained parameters by group, those that decay apart: for the optimizer, with `name`, `factor`.

    Alayrac et al. 2022, appendix B.1.2: decay on matrices of the gated blocks, none on the
    resampler; gates, norms and embeddings are no matrices of a projection.
    """
    tables = {id(parameter) for parameter in _tables(model)}
    # The LM's tables apart from the added tokens, whose name they share: ZeRO counts the updates of a
    # whole group, and tables may be unfrozen later.
    groups: dict[tuple[str, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in trained(model).items():
        table = id(parameter) in tables
        group = group_of(name, table)
        # Under ZeRO-3 a parameter lies flat in pieces, and remembers the shape that it had.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        decays = group == "gated_blocks" and len(shape) == 2
        groups.setdefault((group, decays, table), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if decays else 0.0,
            "name": group,
            "factor": config.lr_factors.get(group, 1.0),  # type: ignore[call-overload]
        }
        for (group, decays, _), parameters in groups.items()
    ]


def _tables(model: nn.Module) -> list[nn.Parameter]:
    """The LM's own embedding tables, if the model or what it wraps has any."""
    inner: Any = getattr(model, "model", model)
    if not hasattr(inner, "get_input_embeddings"):
        return []
    return [part.weight for part in (inner.get_input_embeddings(), inner.get_output_embeddings())]


def adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW in one fused kernel over the trained parameters."""
    groups = parameter_groups(model, config)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(step: int, steps: int, config: AdamWConfig) -> float:
    """The rate of step 0..steps-1, a pure function: resuming needs no state."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return config.lr * warm * (config.final_lr + (1 - config.final_lr) * _height(step, steps, config))


def _height(step: int, steps: int, config: AdamWConfig) -> float:
    """1 at first, 0 at the end; a constant rate stays at 1."""
    after = max(1, steps - config.warmup_steps)
    done = min(1.0, max(0, step - config.warmup_steps) / after)
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if config.schedule == "linear":
        return 1 - done
    if config.schedule == "wsd":
        return min(1.0, (steps - step) / max(1.0, config.decay_share * steps))
    return 1.0

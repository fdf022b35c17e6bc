"""The learning rate as a function of the step, and what weight decay acts on."""

from __future__ import annotations

import pytest
import torch

from flamingo.train.config import OptimizerConfig
from flamingo.train.optim import adamw, learning_rate, parameter_groups

CONSTANT = OptimizerConfig(lr=2.0, warmup_steps=4)
COSINE = OptimizerConfig(lr=2.0, warmup_steps=4, schedule="cosine")
FLOOR = OptimizerConfig(lr=2.0, warmup_steps=4, schedule="cosine", final_lr=0.1)
NO_WARMUP = OptimizerConfig(lr=2.0, warmup_steps=0, schedule="cosine")


@pytest.mark.parametrize(
    ("config", "step", "rate"),
    [
        # step 0 trains already, the last step of the warm-up has the full rate
        (CONSTANT, 0, 0.5),
        (CONSTANT, 1, 1.0),
        (CONSTANT, 3, 2.0),
        (CONSTANT, 4, 2.0),
        (CONSTANT, 23, 2.0),
        (COSINE, 1, 1.0),
        (COSINE, 4, 2.0),  # the cosine starts where the warm-up ends
        (COSINE, 14, 1.0),  # half way of the 20 steps after the warm-up
        (COSINE, 9, 1 + 0.5**0.5),
        (COSINE, 24, 0.0),
        (COSINE, 99, 0.0),
        (FLOOR, 14, 1.1),
        (FLOOR, 24, 0.2),
        (NO_WARMUP, 0, 2.0),
        (NO_WARMUP, 12, 1.0),
    ],
)
def test_the_rate_of_a_step(config, step, rate):
    assert learning_rate(step, 24, config) == pytest.approx(rate)


def test_the_rate_never_rises_after_the_warm_up_and_never_jumps():
    rates = [learning_rate(step, 24, FLOOR) for step in range(24)]
    changes = [after - before for before, after in zip(rates, rates[1:], strict=False)]
    assert all(change > 0 for change in changes[:3])
    assert all(change <= 0 for change in changes[3:])
    assert max(map(abs, changes)) <= 0.5


def test_a_run_shorter_than_its_warm_up_only_rises():
    rates = [learning_rate(step, 3, COSINE) for step in range(3)]
    assert rates == [0.5, 1.0, 1.5]


def test_only_matrices_of_the_gated_blocks_decay(model):
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, plain = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    matrices = ("attn.to_q", "attn.to_kv", "attn.to_out", "ff.1", "ff.3")
    expected = {f"gated_blocks.{i}.{matrix}.weight" for i in (0, 1) for matrix in matrices}
    assert {names[p] for p in decayed["params"]} == expected


def test_every_trained_parameter_is_optimized_once_and_no_frozen_one(model):
    grouped = [p for group in parameter_groups(model, 0.1) for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {p for p in model.parameters() if p.requires_grad}


def test_without_gated_blocks_there_is_no_empty_group():
    (group,) = parameter_groups(torch.nn.Linear(2, 2), 0.1)
    assert group["weight_decay"] == 0.0


def test_the_optimizer_is_as_the_recipe_says(model):
    config = OptimizerConfig(lr=3e-4, betas=(0.8, 0.95), weight_decay=0.2)
    groups = adamw(model, config).param_groups
    assert [group["weight_decay"] for group in groups] == [0.2, 0.0]
    assert {(group["lr"], group["betas"]) for group in groups} == {(3e-4, (0.8, 0.95))}

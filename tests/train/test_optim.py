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


@pytest.mark.parametrize(
    ("fields", "step", "rate"),
    [
        ({"schedule": "linear"}, 4, 2.0),
        ({"schedule": "linear"}, 14, 1.0),
        ({"schedule": "linear", "final_lr": 0.5}, 14, 1.5),
        ({"schedule": "wsd", "decay_share": 0.25}, 17, 2.0),  # stable until a quarter is left
        ({"schedule": "wsd", "decay_share": 0.25}, 21, 1.0),
        ({"schedule": "wsd", "decay_share": 0.25, "final_lr": 0.1}, 23, 2 * (0.1 + 0.9 / 6)),
    ],
)
def test_linear_and_wsd_schedules(fields, step, rate):
    config = OptimizerConfig(lr=2.0, warmup_steps=4, **fields)
    assert learning_rate(step, 24, config) == pytest.approx(rate)


def test_only_matrices_of_the_gated_blocks_decay(model):
    names = {parameter: name for name, parameter in model.named_parameters()}
    matrices = ("attn.to_q", "attn.to_kv", "attn.to_out", "ff.1", "ff.3")
    expected = {f"gated_blocks.{i}.{matrix}.weight" for i in (0, 1) for matrix in matrices}
    groups = parameter_groups(model, OptimizerConfig(weight_decay=0.1))
    assert {names[p] for group in groups if group["weight_decay"] for p in group["params"]} == expected
    assert {group["weight_decay"] for group in groups} == {0.1, 0.0}


def test_groups_have_learning_rates_of_their_own(model):
    model.unfreeze("embeddings")
    model.language_model.model.layers[0].self_attn.lora_A = torch.nn.Linear(2, 2)
    config = OptimizerConfig(lr_factors={"gates": 10, "resampler": 0.5, "embeddings": 0.1, "lora": 3})
    names = {parameter: name for name, parameter in model.named_parameters()}
    factors = {names[p]: g["factor"] for g in parameter_groups(model, config) for p in g["params"]}
    assert factors["gated_blocks.0.attn_gate"] == 10 and factors["gated_blocks.0.attn.to_q.weight"] == 1
    assert factors["resampler.latents"] == 0.5 and factors["added_tokens.input"] == 0.1
    assert factors["language_model.model.embed_tokens.weight"] == 0.1
    assert factors["language_model.model.layers.0.self_attn.lora_A.weight"] == 3


def test_every_trained_parameter_is_optimized_once_and_no_frozen_one(model):
    grouped = [p for group in parameter_groups(model, OptimizerConfig()) for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {p for p in model.parameters() if p.requires_grad}


def test_the_optimizer_is_as_the_recipe_says(model):
    config = OptimizerConfig(lr=3e-4, betas=(0.8, 0.95), weight_decay=0.2)
    groups = adamw(model, config).param_groups
    assert {group["weight_decay"] for group in groups} == {0.2, 0.0}
    assert {(group["lr"], group["betas"]) for group in groups} == {(3e-4, (0.8, 0.95))}

"""A run that goes on from a checkpoint is the run that was never broken."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.train.ranks import in_ranks
from tests.train.steps import all_going_on, all_unbroken, going_on

SETTINGS = [
    {"zero_stage": stage, "autocast": autocast, "optimizer": {"lr": 1e-2, "warmup_steps": 0}}
    for stage, autocast in itertools.product((0, 1, 2, 3), ("float32", "bfloat16"))
]


def compare(whole, again) -> None:
    losses, weights = whole
    more, same = again
    assert more and losses[-len(more) :] == more
    assert weights.keys() == same.keys()
    for name, value in weights.items():
        assert torch.equal(value, same[name]), name


@pytest.mark.parametrize("steps", [6, pytest.param(53, marks=pytest.mark.slow)])
def test_the_steps_after_a_checkpoint_are_bitwise_those_of_the_unbroken_run(tmp_path, steps):
    """In new processes; every stage, fp32 and bf16; every second one is written in the background."""
    runs = str(tmp_path / "runs")
    unbroken = in_ranks(2, tmp_path / "unbroken", all_unbroken, runs, SETTINGS, steps, 3)
    resumed = in_ranks(2, tmp_path / "going-on", all_going_on, runs, SETTINGS, steps)
    for rank in range(2):
        for whole, again in zip(unbroken[rank], resumed[rank], strict=True):
            assert len(whole[0]) == steps and len(again[0]) == steps - 3
            compare(whole, again)


@pytest.mark.parametrize("steps", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_another_number_of_ranks_and_another_stage_go_on_alike(tmp_path, steps):
    """3 ranks, then 1, then 2: the losses are those of one rank that was never broken."""
    plain = {"optimizer": {"lr": 1e-2, "warmup_steps": 0}}
    (whole,) = in_ranks(1, tmp_path / "whole", going_on, str(tmp_path / "a"), plain, 3 * steps)
    losses = []
    for number, (ranks, stage) in enumerate(((3, 2), (1, 0), (2, 3)), 1):
        fields = {**plain, "zero_stage": stage}
        found = in_ranks(
            ranks, tmp_path / str(ranks), going_on, str(tmp_path / "b"), fields, number * steps, True
        )
        losses += found[0][0]
    assert losses == pytest.approx(whole[0], abs=1e-5)

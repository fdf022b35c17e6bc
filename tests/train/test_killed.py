"""A run whose ranks are killed at any moment goes on as if nothing had happened."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import torch

from tests.train.ranks import in_ranks, start
from tests.train.steps import to_the_end

EVERY, STEPS_A_LIFE = 2, 10  # more than ranks reach before they are killed


def killed(folder: Path, out: Path, steps: int, chance: random.Random, in_a_write: bool) -> bool:
    """Start two ranks and kill them, inside a checkpoint write or anywhere; whether it was in one.

    Raises AssertionError where they had ended by themselves.
    """
    context = start(2, out, to_the_end, (str(folder), steps, EVERY))
    until = time.monotonic() + 120
    before = max((p.name for p in folder.glob("step-*")), default="")
    while time.monotonic() < until:  # until it has begun, and made a checkpoint of its own
        if max((p.name for p in folder.glob("step-*")), default="") > before:
            break
        if not all(process.is_alive() for process in context.processes):
            break
        time.sleep(0.002)
    time.sleep(chance.uniform(0, 0.1))
    while in_a_write and time.monotonic() < until and not list(folder.glob(".step-*.part")):
        time.sleep(0.0002)
    time.sleep(chance.uniform(0, 0.01))
    writing = bool(list(folder.glob(".step-*.part")))
    assert all(process.is_alive() for process in context.processes), "they ended before they were killed"
    for process in context.processes:
        process.kill()
    for process in context.processes:
        process.join()
    return writing


@pytest.mark.slow
@pytest.mark.parametrize("kills", [50])
def test_ranks_killed_at_random_moments_resume_to_the_same_weights(tmp_path, kills):
    """Half of the kills are aimed at the writing of a checkpoint."""
    chance, writing, steps = random.Random(0), 0, kills * STEPS_A_LIFE  # noqa: S311
    for number in range(kills):
        writing += killed(tmp_path / "run", tmp_path / f"out-{number}", steps, chance, number % 2 == 0)
    assert writing >= kills // 4
    again = in_ranks(2, tmp_path / "again", to_the_end, str(tmp_path / "run"), steps, EVERY)
    whole = in_ranks(2, tmp_path / "whole", to_the_end, str(tmp_path / "unbroken"), steps, EVERY)
    for one, other in zip(again, whole, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    print(f"{kills} kills, {writing} of them inside a checkpoint write")

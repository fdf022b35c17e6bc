"""A run whose ranks are killed at any moment goes on as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tests import warm
from tests.end_to_end.runs import same
from tests.train.ranks import free_port

STEPS_A_LIFE = 12  # more than ranks come nearer to the end before they are killed
SECONDS = 120  # in which a life has begun, and ended
SETTINGS = ["checkpoint_every=2", "blank_every=50", "workers=1", "feature_cache_gb=0"]
SETTINGS += ["watchdog_seconds=15"]  # that a rank waits for one that was killed before they met
SETTINGS += ["autocast=float32", "model.frozen_dtype=float32"]  # fast on any processor
# What decides where a checkpoint's tensors are, how gradients are added up, and who writes.
WAYS = {
    "whole": ["zero_stage=0"],
    "in pieces": ["zero_stage=2"],
    "behind": ["zero_stage=0", "checkpoint_background=true"],
}


class Life:
    """Two ranks of one run, as `python -m flamingo.train RECIPE ... --resume`, from their start on."""

    def __init__(self, run: Path, words: list[str], out: Path) -> None:
        self.checkpoints, self.began = run / "checkpoints", time.monotonic()
        self.newest = self._newest()
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
        alike = {**os.environ, **meet, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
        self.ranks: list[BaseProcess] = []
        self.said = [out / f"rank{rank}.txt" for rank in range(2)]
        out.mkdir()
        for rank, said in enumerate(self.said):
            env = {**alike, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            call = ("flamingo.train", *words, f"run={run}", "--resume")
            self.ranks.append(warm.start(*call, env=env, out=said, err=said))

    def _newest(self) -> str:
        return max((path.name for path in self.checkpoints.glob("step-*")), default="")

    def writing(self) -> bool:
        return any(self.checkpoints.glob(".step-*.part"))

    def kept(self) -> bool:
        """Whether it has made a checkpoint of its own."""
        return self._newest() > self.newest

    def wait(self, until: Callable[[], bool]) -> None:
        while not until():
            assert time.monotonic() < self.began + SECONDS and self.alive(), self.told()
            time.sleep(0.0002)

    def alive(self) -> bool:
        return all(rank.is_alive() for rank in self.ranks)

    def kill(self, victims: list[BaseProcess]) -> None:
        """By SIGKILL. A rank that is left cannot go on, and must end by itself."""
        assert self.alive(), self.told()
        for rank in victims:
            rank.kill()
        for rank, said in zip(self.ranks, self.said, strict=True):
            rank.join(SECONDS)
            assert rank.exitcode == (-signal.SIGKILL if rank in victims else 1), self.told()
            assert rank in victims or "lost another rank" in said.read_text(), self.told()

    def end(self) -> None:
        for rank in self.ranks:
            rank.join(SECONDS * 10)
            assert rank.exitcode == 0, self.told()

    def told(self) -> str:
        return "\n".join(said.read_text() for said in self.said if said.exists())


def kill(life: Life, number: int, chance: random.Random, opening: float) -> bool:
    """Kill it at a moment of its number's kind; whether that was inside the write of a checkpoint.

    Half of them are aimed at a write, a quarter at any moment of the steps, and a quarter at any until
    a life's first checkpoint, which takes `opening` seconds.
    """
    if number % 4 == 1:
        time.sleep(chance.uniform(0, opening))
    else:
        life.wait(life.kept)
        time.sleep(chance.uniform(0, 0.3))
    if number % 2 == 0:
        life.wait(life.writing)
        time.sleep(chance.uniform(0, 0.01))
    inside = life.writing()
    life.kill(chance.choice([life.ranks, life.ranks[:1], life.ranks[1:]]))
    return inside


@pytest.mark.slow
@pytest.mark.parametrize(("way", "kills"), [("whole", 20), ("in pieces", 20), ("behind", 10)])
def test_ranks_killed_at_random_moments_resume_to_the_same_run(way, kills, world: Path, tmp_path: Path):
    """Both ranks, or one of them; while they start, load, train or write."""
    chance, inside, opening = random.Random(0), 0, 0.0  # noqa: S311
    steps = kills * STEPS_A_LIFE
    words = [str(world / "recipe.yaml"), f"steps={steps}", *SETTINGS, *WAYS[way]]
    for number in range(kills):
        life = Life(tmp_path / "run", words, tmp_path / f"out-{number}")
        inside += kill(life, number, chance, opening)
        if not opening:
            opening = time.monotonic() - life.began
    Life(tmp_path / "run", words, tmp_path / "out").end()
    Life(tmp_path / "unbroken", words, tmp_path / "whole").end()
    same(tmp_path / "run", tmp_path / "unbroken", steps)
    print(f"{way}: {kills} kills, {inside} of them inside the write of a checkpoint")
    assert inside >= kills // 4

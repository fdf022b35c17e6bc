"""A rank that hangs before the first step or after the last one is named too, and so is one that never
comes; the run ends."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

from flamingo.train import session
from flamingo.train.config import read_recipe
from flamingo.train.watchdog import STATUS
from tests import warm
from tests.end_to_end.conftest import environment
from tests.train.ranks import free_port, start

HANGS = {"open_data": (1, "opening the data"), "export_run": (0, "writing the model")}
SECONDS = 3  # four times as long for both


def hang(path: str, run: str, name: str) -> None:
    """In a rank: a run in which one of them does not come back from a function of the session."""
    whole, hangs = getattr(session, name), HANGS[name][0]

    def called(*given: Any) -> Any:
        if dist.get_rank() == hangs:
            time.sleep(3600)
        return whole(*given)

    with patch.object(session, name, called):
        session.train(read_recipe(path, [f"run={run}", "steps=1", f"watchdog_seconds={SECONDS}"]))


@pytest.mark.parametrize("name", HANGS)
def test_a_rank_that_hangs_in_loading_or_in_the_export_ends_the_run(name: str, world: Path, tmp_path: Path):
    run, (hangs, phase) = tmp_path / "run", HANGS[name]
    context = start(2, tmp_path / "out", hang, (str(world / "recipe.yaml"), str(run), name))
    for process in context.processes:
        process.join(120)
        assert process.exitcode == STATUS
    stacks = [(run / f"watchdog-rank{rank}.txt").read_text() for rank in range(2)]
    assert f"{phase}: no beat for" in stacks[hangs] and "in called" in stacks[hangs]
    assert "in called" not in stacks[1 - hangs] and "distributed_c10d.py" in stacks[1 - hangs]


def test_a_rank_that_comes_alone_ends_and_says_who_is_missing(world: Path, tmp_path: Path):
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    env = environment() | alone | {"MASTER_PORT": str(free_port()), "DS_ACCELERATOR": "cpu"}
    words = [world / "recipe.yaml", f"run={tmp_path / 'run'}", "watchdog_seconds=1"]
    done = warm.run("flamingo.train", *words, env=env, timeout=60)
    assert done.returncode == 1 and not (tmp_path / "run").exists()
    (said,) = (line for line in done.stderr.splitlines() if line.startswith("error"))
    assert said.startswith("error (rank 0): lost another rank") and "1/2 clients joined" in said
    assert "Traceback" not in done.stderr

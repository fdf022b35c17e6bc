"""`flamingo train`: starts one process per GPU, or two on a CPU, with DeepSpeed's launcher."""

from __future__ import annotations

import os
import subprocess
import sys

from flamingo.runtime import cores, default_processes
from flamingo.train.config import read_recipe


def environment(ranks: int) -> dict[str, str]:
    """The environment of the ranks."""
    import torch

    env = dict(os.environ)
    if not torch.cuda.is_available():
        env["DS_ACCELERATOR"] = "cpu"
        env.setdefault("OMP_NUM_THREADS", str(max(1, cores() // ranks)))
    return env


def launch(
    recipe: str, overrides: list[str], resume: bool, ranks: int | None, accept_changed_shards: bool = False
) -> int:
    """Check the recipe here, where its errors are short, then run it. Returns the exit status."""
    read_recipe(recipe, overrides)
    ranks = ranks or default_processes()
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
    command += [
        "--quiet",
        "--master_port",
        str(_free_port()),
        "--module",
        "flamingo.train",
        recipe,
        *overrides,
    ]
    command += ["--resume"] if resume else []
    command += ["--accept-changed-shards"] if accept_changed_shards else []
    return subprocess.run(command, env=environment(ranks)).returncode


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

"""`flamingo train` checks what it can before it starts, and passes on what it is asked."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from flamingo.train import launch as module
from flamingo.train.launch import check_processes, launch, supervise


@pytest.fixture
def gpus(monkeypatch):
    def have(number: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)

    return have


def test_more_processes_than_gpus_are_refused_before_anything_starts(gpus, recipe_file, monkeypatch):
    monkeypatch.setattr(module, "supervise", lambda *_: pytest.fail("it started"))
    gpus(4)
    with pytest.raises(ValueError, match="--processes 5, but .* 4 GPUs.*CUDA_VISIBLE_DEVICES"):
        launch(str(recipe_file), [], False, 5)
    check_processes(4)
    gpus(0)
    check_processes(5)  # processes of a CPU


def test_the_launcher_gets_the_recipe_as_it_stands(gpus, recipe_file, monkeypatch):
    started = []
    monkeypatch.setattr(module, "supervise", lambda command, env: started.append((command, env)) or 75)
    gpus(0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert launch(str(recipe_file), ["steps=7"], True, 2, accept_changed_shards=True) == 75
    ((command, env),) = started
    after = command[command.index("--module") :]
    assert after == [
        "--module",
        "flamingo.train",
        str(recipe_file),
        "steps=7",
        "--resume",
        "--accept-changed-shards",
    ]
    assert command[command.index("--num_gpus") + 1] == "2"
    assert env["DS_ACCELERATOR"] == "cpu" and int(env["OMP_NUM_THREADS"]) >= 1
    with pytest.raises(ValueError, match="stepz"):
        launch(str(recipe_file), ["stepz=7"], True, 2)


# A launcher as DeepSpeed's: it knows no SIGUSR1, and hands on the status of its rank.
LAUNCHER = """
    import subprocess, sys
    sys.exit(subprocess.run([sys.executable, "-c", sys.argv[1], sys.argv[2]]).returncode)
"""
RANK = textwrap.dedent("""
    import pathlib, signal, sys, time
    pathlib.Path(sys.argv[1] + "-soon").touch()
    time.sleep(0.5)  # imports: it does not listen yet
    asked = []
    signal.signal(signal.SIGUSR1, lambda *_: asked.append(1))
    pathlib.Path(sys.argv[1]).touch()
    while not asked:
        time.sleep(0.05)
    time.sleep(0.3)  # the step and its checkpoint
    sys.exit(75)
""")


def started(folder: Path) -> multiprocessing.Process:
    program = folder / "launcher.py"
    program.write_text(textwrap.dedent(LAUNCHER))

    def run() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests that run under nohup ignore it
        command = [sys.executable, str(program), RANK, str(folder / "listens")]
        os._exit(supervise(command, dict(os.environ)))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process  # type: ignore[return-value]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_reaches_the_ranks_and_their_status_comes_back(tmp_path, number):
    process = started(tmp_path)
    while not (tmp_path / "listens").exists():
        time.sleep(0.05)
    os.kill(process.pid or 0, number)
    process.join(60)
    assert process.exitcode == 75


def test_a_signal_that_comes_before_the_ranks_listen_is_not_lost(tmp_path):
    process = started(tmp_path)
    while not (tmp_path / "listens-soon").exists():
        time.sleep(0.02)
    os.kill(process.pid or 0, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 75 and (tmp_path / "listens").exists()


def test_a_launcher_that_was_killed_is_no_success():
    before = signal.getsignal(signal.SIGTERM)
    assert supervise(["/bin/sh", "-c", "kill -KILL $$"], dict(os.environ)) == 137
    assert supervise(["/bin/sh", "-c", "exit 3"], dict(os.environ)) == 3
    assert signal.getsignal(signal.SIGTERM) is before

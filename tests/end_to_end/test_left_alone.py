"""A run that is asked to stop, loses a rank, or hangs: it ends as documented and goes on as if nothing
had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from flamingo.train.watchdog import COLLECTIVES
from tests.end_to_end.runs import records, same

STEPS = 100
SETTINGS = ["blank_every=0", "checkpoint_every=10", "workers=1", "feature_cache_gb=0", f"steps={STEPS}"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
CLI = [sys.executable, "-m", "flamingo.cli", "train", "--processes", "2"]


@contextmanager
def running(*command: str) -> Iterator[subprocess.Popen]:
    fresh = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # see `flamingo.train.group`
    env = {**os.environ, **fresh, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "NO_COLOR": "1"}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()


def ended(process: subprocess.Popen, status: int) -> str:
    said = process.communicate(timeout=300)[0]
    assert process.returncode == status, said
    return said


def wait_for(process: subprocess.Popen, run: Path, steps: int) -> None:
    """Until the run has taken so many steps."""
    until = time.monotonic() + 200
    while len(records(run)) < steps:
        assert process.poll() is None and time.monotonic() < until, process.communicate(timeout=60)[0]
        time.sleep(0.02)


def rank(process: subprocess.Popen, number: int) -> psutil.Process:
    """The process of a rank, not of its loader (whose parent is one as well)."""
    for child in psutil.Process(process.pid).children(recursive=True):
        parent = child.parent()
        if child.environ().get("RANK") == str(number) and parent and "RANK" not in parent.environ():
            return child
    raise AssertionError(f"no rank {number}")


@pytest.fixture(scope="module")
def unbroken(world: Path) -> Path:
    """The run that nothing happens to."""
    with running(*CLI, str(world / "recipe.yaml"), f"run={world / 'unbroken'}", *SETTINGS) as process:
        ended(process, 0)
    return world / "unbroken"


@pytest.fixture
def job(world: Path, tmp_path: Path) -> list[str]:
    return [str(world / "recipe.yaml"), f"run={tmp_path / 'run'}", *SETTINGS]


@pytest.mark.slow
def test_a_rank_that_is_killed_under_torchrun_leads_to_a_resumed_run(job, tmp_path, unbroken):
    with running(*TORCHRUN, "--max-restarts", "1", "-m", "flamingo.train", *job) as process:
        wait_for(process, tmp_path / "run", 25)
        rank(process, 1).kill()
        said = ended(process, 0)
    assert "going on from" in said
    same(tmp_path / "run", unbroken, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_is_asked_to_stop_ends_with_75_and_goes_on(number, job, tmp_path, unbroken):
    run = tmp_path / "run"
    with running(*CLI, *job) as process:
        wait_for(process, run, 25)
        process.send_signal(number)
        said = ended(process, 75)
    stopped = json.loads((run / "stopped.json").read_text())
    assert stopped["step"] == len(records(run)) and "SIGUSR1" in stopped["reason"]
    assert f"stopped after step {stopped['step']}" in said and "Traceback" not in said
    assert (run / "checkpoints" / f"step-{stopped['step']:06d}").is_dir() and not (run / "lock").exists()
    with running(*CLI, *job, "--resume") as process:
        ended(process, 0)
    assert not (run / "stopped.json").exists()
    same(run, unbroken, STEPS)


@pytest.mark.slow
def test_the_wall_time_ends_a_run_with_75(job, tmp_path):
    with running(*CLI, *job, "wall_minutes=0.01") as process:
        ended(process, 75)
    stopped = json.loads((tmp_path / "run" / "stopped.json").read_text())
    assert stopped["step"] == 1 and stopped["reason"].startswith("wall_minutes=0.01 have passed")


@pytest.mark.slow
def test_torchrun_does_not_restart_what_was_asked_to_stop(job, tmp_path):
    """Its agent passes the signal on; the ranks end with 0, so nothing is restarted."""
    signals = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    options = ["--max-restarts", "3", "--signals-to-handle", signals, "--shutdown-timeout", "120"]
    with running(*TORCHRUN, *options, "-m", "flamingo.train", *job) as process:
        wait_for(process, tmp_path / "run", 15)
        process.send_signal(signal.SIGUSR1)
        said = ended(process, 1)  # torchrun says 1 for any signal
    assert "stopped after step" in said and "going on from" not in said
    assert (tmp_path / "run" / "stopped.json").exists()


@pytest.mark.slow
def test_a_live_run_keeps_another_out_of_its_folder(job, tmp_path):
    with running(*CLI, *job) as process:
        wait_for(process, tmp_path / "run", 5)
        rank(process, 0).suspend()  # so that it is surely still there
        with running(*CLI, *job, "--resume") as other:
            said = ended(other, 1)
        assert "in use by a live run (host " in said and "Traceback" not in said
        rank(process, 0).resume()
        (tmp_path / "run" / "stop").touch()
        said = ended(process, 75)
    assert f"{tmp_path / 'run' / 'stop'} is there" in said


@pytest.mark.slow
def test_a_rank_that_stands_still_is_named_and_the_run_ends_with_70(job, tmp_path):
    with running(*CLI, *job, "watchdog_seconds=8") as process:
        wait_for(process, tmp_path / "run", 15)
        rank(process, 1).suspend()
        said = ended(process, 70)
    (message,) = (line for line in said.splitlines() if line.startswith("  hangs: "))
    assert message.startswith("  hangs: rank 1, step ") and message.endswith("no longer answers")
    stacks = (tmp_path / "run" / "watchdog-rank0.txt").read_text()
    assert COLLECTIVES in stacks  # it waits for the other, wherever in the step that is

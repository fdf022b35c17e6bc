"""Signals, the wall-time limit and RUN/stop end a run after its step, on all ranks together."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import psutil
import pytest
import torch.distributed as dist
from torch.utils.data import Dataset

from flamingo.data.steps import step_loader
from flamingo.train import stopping
from flamingo.train.stopping import Stopping


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_only_leaves_a_wish_also_when_it_comes_twice(number):
    before = signal.getsignal(number)
    with Stopping() as asked:
        assert asked.wish is None and asked.agreed() is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)  # a second one lets the step finish, too
        assert asked.wish == asked.agreed() == number.name
    assert signal.getsignal(number) is before


def test_the_wall_time_counts_from_the_start_of_the_process(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Stopping() as asked:
        now[0] += 100  # imports, before the recipe is read
        asked.limit(wall_minutes=2.5)
        now[0] += 49
        assert asked.wish is None
        now[0] += 2
        assert asked.wish == "wall_minutes=2.5 have passed"


def test_no_limit_and_no_file_mean_no_wish(tmp_path, monkeypatch):
    with Stopping() as asked:
        asked.limit(None, tmp_path / "not there")
        monkeypatch.setattr(time, "monotonic", lambda: 1e12)
        assert asked.wish is None


def test_a_file_in_the_run_folder_asks_too_and_the_answer_takes_it_away(tmp_path):
    with Stopping() as asked:
        asked.limit(None, tmp_path)
        assert asked.wish is None
        (tmp_path / "stop").touch()
        reason = asked.agreed()
        assert reason and str(tmp_path / "stop") in reason
        stopping.answer(tmp_path, 12, reason)
    assert os.listdir(tmp_path) == ["stopped.json"]
    assert json.loads((tmp_path / "stopped.json").read_text()) == {"step": 12, "reason": reason}
    stopping.forget(tmp_path)
    assert os.listdir(tmp_path) == []
    stopping.forget(tmp_path / "not there")


def test_the_status_asks_to_be_run_again_except_of_torchrun_which_would_restart_at_once():
    assert stopping.status({}) == os.EX_TEMPFAIL == 75
    assert stopping.status({"TORCHELASTIC_RUN_ID": "none"}) == 0


def ten_steps_and_a_wish(rank: int, store: str, said: multiprocessing.Queue) -> None:
    with Stopping() as asked:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
        for step in range(10):
            if step == 4 and rank == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            if reason := asked.agreed():
                said.put((step, reason))
                break
        dist.destroy_process_group()


def test_the_wish_of_one_rank_stops_all_after_the_same_step(tmp_path):
    fork = multiprocessing.get_context("fork")
    said = fork.Queue()
    ranks = [
        fork.Process(target=ten_steps_and_a_wish, args=(rank, str(tmp_path / "store"), said))
        for rank in range(3)
    ]
    for process in ranks:
        process.start()
    assert [said.get(timeout=60) for _ in ranks] == [(4, "SIGUSR1 (rank 1)")] * 3
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0


class Pids(Dataset):
    """Each step is the process that read it."""

    def __getitem__(self, step: int) -> int:
        return os.getpid()


@pytest.fixture
def threads_in_forks():
    """As grpc does: every new process has a thread before anything else runs in it."""
    wanted = [True]

    def begin() -> None:
        if wanted:
            threading.Thread(target=time.sleep, args=(600,), daemon=True).start()

    os.register_at_fork(after_in_child=begin)
    yield
    wanted.clear()


@pytest.fixture(params=["fork", "forkserver"])
def begun_by(request: pytest.FixtureRequest):
    """Python's way to start processes: fork before 3.14, then forkserver."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.usefixtures("threads_in_forks", "begun_by")
def test_the_loaders_processes_outlive_a_signal_to_the_whole_job_and_end_with_their_rank():
    steps = step_loader(Pids(), 0, 40, workers=1)  # type: ignore[arg-type]
    worker = next(steps)
    assert isinstance(worker, int) and worker != os.getpid()
    command = "import os, signal, sys; [os.kill(int(sys.argv[1]), s) for s in (15, signal.SIGUSR1, 15)]"
    subprocess.run([sys.executable, "-c", command, str(worker)], check=True)  # not its rank
    assert [step for step in steps if step != worker] == []
    again = step_loader(Pids(), 0, 40, workers=1)  # type: ignore[arg-type]
    os.kill(next(again), signal.SIGTERM)  # type: ignore[arg-type] # its rank gives the loader up
    (process,) = again._workers  # type: ignore[attr-defined]
    process.join(20)
    assert process.exitcode == 0


def read_for_ever(said: multiprocessing.Queue, begun_by: str) -> None:
    multiprocessing.set_start_method(begun_by, force=True)
    steps = step_loader(Pids(), 0, 40, workers=1)  # type: ignore[arg-type]
    said.put(next(steps))
    time.sleep(600)


@pytest.mark.usefixtures("threads_in_forks")
def test_a_loaders_process_ends_with_a_rank_that_was_killed(begun_by):
    # A fork would ask for its processes at the server of its parent.
    context: Any = multiprocessing.get_context("fork" if begun_by == "fork" else "spawn")
    said = context.Queue()
    rank = context.Process(target=read_for_ever, args=(said, begun_by))
    rank.start()
    worker = psutil.Process(said.get(timeout=60))
    rank.kill()
    rank.join(60)
    until = time.monotonic() + 60
    while not ended(worker) and time.monotonic() < until:
        time.sleep(0.02)
    assert ended(worker)


def ended(process: psutil.Process) -> bool:
    """Whoever inherited it may not have asked yet how it ended."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True

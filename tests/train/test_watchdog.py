"""A hung rank is named with what it was doing, and every rank ends; slow phases that get on live."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from flamingo.train.watchdog import STATUS, Watchdog, described, short, split
from tests.train.ranks import free_port

FORK = multiprocessing.get_context("fork")


def hang_in_reading() -> None:
    time.sleep(3600)


def stop_the_process() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def hold_the_interpreter() -> None:
    ctypes.PyDLL(None).sleep(3600)  # PyDLL keeps the interpreter's lock


def train(rank: int, world: int, port: int, run: Path, hangs) -> None:
    """Steps of a real group; in step 3, rank 1 does not come back from its data."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group("gloo")
    with Watchdog(run, rank, world, seconds=1.0) as watchdog:
        for step in range(1, 100):
            watchdog.beat(step, "data")
            if step == 3 and rank == world - 1:
                hangs()
            watchdog.beat(step, "step")
            dist.all_reduce(torch.zeros(1))


def run(world: int, folder: Path, hangs) -> list:
    port = free_port()
    ranks = [FORK.Process(target=train, args=(rank, world, port, folder, hangs)) for rank in range(world)]
    for process in ranks:
        process.start()
    return ranks


def test_the_rank_that_sleeps_for_ever_is_named_and_both_end_with_the_status(tmp_path, capfd):
    ranks = run(2, tmp_path, hang_in_reading)
    for process in ranks:
        process.join(60)
        assert process.exitcode == STATUS == os.EX_SOFTWARE
    said = capfd.readouterr().err
    (message,) = said.split("error: watchdog: ")[1:]
    hung, waiting = (line for line in message.splitlines() if "rank " in line)
    assert hung.startswith("  hangs: rank 1, step 3, data: in hang_in_reading (test_watchdog.py:")
    assert waiting.startswith("  waits: rank 0, step 3, step: in ") and "all_reduce" in waiting
    assert "no beat for 1 s (watchdog_seconds=1):" in message and str(tmp_path) in message
    assert "hang_in_reading" in (tmp_path / "watchdog-rank1.txt").read_text()
    stacks = (tmp_path / "watchdog-rank0.txt").read_text()
    assert stacks.startswith("rank 0 of 2, host ") and "step 3, step: no beat for" in stacks
    assert "all_reduce" in stacks


def test_a_rank_whose_whole_process_stands_still_is_named_by_the_others(tmp_path, capfd):
    ranks = run(2, tmp_path, stop_the_process)
    try:
        ranks[0].join(60)
        assert ranks[0].exitcode == STATUS
        (hung,) = (line for line in capfd.readouterr().err.splitlines() if "hangs:" in line)
        assert hung.startswith("  hangs: rank 1, ") and hung.endswith("its process no longer answers")
    finally:
        os.kill(ranks[1].pid, signal.SIGKILL)
        ranks[1].join()


def test_a_rank_that_holds_the_interpreter_ends_too_and_says_where(tmp_path, capfd):
    (process,) = run(1, tmp_path, hold_the_interpreter)
    process.join(60)
    assert process.exitcode == 1
    said = capfd.readouterr().err
    assert "Timeout" in said and "in hold_the_interpreter" in said


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_nothing_is_overdue_before_the_first_beat_or_while_a_slow_phase_gets_on(clock, tmp_path):
    watchdog = Watchdog(tmp_path, 0, 1, seconds=10)
    clock[0] += 1000  # start-up
    assert watchdog.overdue() is None
    for _ in range(100):
        watchdog.beat(5, "evaluation")
        clock[0] += 9
        assert watchdog.overdue() is None
    clock[0] += 2
    assert watchdog.overdue() == 11
    watchdog.beat(6, "step", patience=4)
    clock[0] += 39
    assert watchdog.overdue() is None
    clock[0] += 2
    assert watchdog.overdue() == 41


def test_zero_seconds_mean_never(clock, tmp_path):
    with Watchdog(tmp_path, 0, 1, seconds=0) as watchdog:
        watchdog.beat(1, "step")
        clock[0] += 1e9
        assert watchdog.overdue() is None


def test_a_run_that_ends_in_time_leaves_no_thread_and_no_file(tmp_path):
    with Watchdog(tmp_path, 0, 1, seconds=60) as watchdog:
        watchdog.beat(1, "step")
    assert not watchdog._thread.is_alive() and list(tmp_path.iterdir()) == []


def state(changes: int, waits: bool = False, silent: bool = False, phase: str = "step") -> dict:
    found = {"changes": changes, "step": 7, "phase": phase, "where": "f (a.py:1)", "waits": waits}
    return {**found, "silent": silent}


def test_behind_are_those_with_the_fewest_phases_then_those_in_no_collective():
    def hung(states: dict) -> list[int]:
        behind, others = split(states)
        assert behind.keys() | others.keys() == states.keys()
        return sorted(behind)

    assert hung({0: state(9, waits=True), 1: state(8), 2: state(9, waits=True)}) == [1]
    assert hung({0: state(9, waits=True), 1: state(9), 2: state(9, waits=True)}) == [1]
    assert hung({0: state(9, waits=True), 1: state(9, waits=True, silent=True)}) == [1]
    assert hung({0: state(9, waits=True), 1: state(9, waits=True)}) == [0, 1]  # the network


def test_a_thousand_ranks_are_named_in_few_lines():
    states = {rank: state(9, waits=True) for rank in range(1024) if rank != 700}
    behind, waiting = split({**states, 700: state(8, phase="data")})
    assert described(behind) == ["rank 700, step 7, data: in f (a.py:1)"]
    assert described(waiting) == ["ranks 0-699, 701-1023, step 7, step: in f (a.py:1)"]
    different = {rank: {**state(9), "where": str(rank)} for rank in range(20)}
    assert len(described(different)) == 9 and described(different)[-1] == "12 more groups of ranks"
    assert short([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"

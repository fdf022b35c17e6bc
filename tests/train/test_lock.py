"""Two live runs never share a folder; a dead one leaves nothing behind that keeps the next out."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from flamingo.train.lock import RunLock

FORK = multiprocessing.get_context("fork")


def hold(run: Path, held, helper: bool = False) -> None:
    """A rank 0 that trains for ever, perhaps with a loader's process of its own."""
    lock = RunLock(run)
    lock.acquire()
    worker = os.fork() if helper else 0
    if helper and worker == 0:
        time.sleep(60)
        os._exit(0)
    held.put(worker)
    time.sleep(60)


def started(run: Path, helper: bool = False):
    held = FORK.Queue()
    process = FORK.Process(target=hold, args=(run, held, helper))
    process.start()
    return process, held.get(timeout=60)


def kill(process) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.join()  # with a timeout it would wait for the loader's process too


def test_another_run_is_kept_out_with_the_words_where_the_first_lives(tmp_path):
    process, _ = started(tmp_path / "run")
    try:
        with pytest.raises(ValueError) as error:
            RunLock(tmp_path / "run").acquire()
        words = str(error.value)
        assert "in use by a live run" in words and "run=FOLDER" in words
        assert f"host {socket.gethostname()}, process {process.pid}, since 20" in words
    finally:
        kill(process)


@pytest.mark.parametrize("place", ["run", "run/below"])
def test_a_file_in_the_place_of_a_run_is_named(tmp_path, place):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ValueError, match=r"run is a file, not a folder: .* run=FOLDER"):
        RunLock(tmp_path / place).acquire()
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize("helper", [False, True], ids=["alone", "with a loader process that outlives it"])
def test_a_killed_run_frees_its_folder_at_once(tmp_path, helper):
    process, worker = started(tmp_path, helper)
    kill(process)
    try:
        lock = RunLock(tmp_path)
        lock.acquire()
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
        lock.release()
    finally:
        if worker:
            os.kill(worker, signal.SIGKILL)


def test_after_a_restart_one_waits_for_a_holder_that_is_about_to_end(tmp_path):
    process, _ = started(tmp_path)
    end = threading.Timer(0.3, kill, [process])
    end.start()
    with RunLock(tmp_path) as lock:
        lock.acquire(wait=60)
    end.join()


def test_a_run_that_never_began_leaves_no_folder_and_a_run_that_did_keeps_its_files(tmp_path):
    with RunLock(tmp_path / "a" / "run") as lock:
        lock.acquire()
        lock.acquire()  # its own already
    assert not (tmp_path / "a" / "run").exists()
    (tmp_path / "recipe.yaml").touch()
    with RunLock(tmp_path) as lock:
        lock.acquire()
    assert (tmp_path / "recipe.yaml").exists() and not (tmp_path / "lock").exists()


def test_whoever_waited_for_a_file_that_was_given_back_takes_the_new_one(tmp_path):
    """Between the opening and the lock, the holder may unlink the file and another make a new one."""
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    (tmp_path / "recipe.yaml").touch()
    first.acquire()
    file = os.open(tmp_path / "lock", os.O_RDWR)
    first.release()
    second.acquire()
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the old file can be had, and means nothing
    assert not RunLock(tmp_path)._is_there(file)
    with pytest.raises(ValueError, match="in use"):
        RunLock(tmp_path).acquire()
    os.close(file)


def test_a_folder_that_cannot_be_written_is_an_error_of_the_system():
    with pytest.raises(OSError):
        RunLock(Path("/dev/null/run")).acquire()  # no folder and no file, for root too


def test_without_locks_a_holder_on_this_machine_is_still_found(tmp_path, monkeypatch):
    def unknown(file: int, what: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", unknown)
    process, _ = started(tmp_path)
    try:
        with pytest.raises(ValueError, match=f"process {process.pid}"):
            RunLock(tmp_path).acquire()
    finally:
        kill(process)
    with pytest.warns(UserWarning, match="knows no locks"), RunLock(tmp_path) as lock:
        lock.acquire()


def test_an_error_of_the_lock_that_means_something_else_is_not_hidden(tmp_path, monkeypatch):
    def broken(file: int, what: int) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="input/output"):
        RunLock(tmp_path).acquire()

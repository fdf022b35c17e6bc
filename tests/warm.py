"""`python -m MODULE ...` in a process whose imports are done: a fork of a server that has them.

Starting Python with torch, transformers and deepspeed costs five seconds of a core, and a training
started by `flamingo train` does it five times. What is forked is a process of its own all the same,
with its arguments, environment, folder, output and children; only imports and the seed of hashes
are shared. One run under the real launcher stays: the fixture `trained` of tests/end_to_end.
"""

from __future__ import annotations

import atexit
import inspect
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

import torch

from flamingo.runtime import cores

# Elsewhere, what a fork inherits of a GPU or of the system's libraries does not work.
WARM = sys.platform == "linux" and not torch.cuda.is_available()
METHOD = "forkserver" if WARM else "spawn"  # to start processes that call a function

multiprocessing.set_forkserver_preload(["tests.warm_imports"])


def run(
    module: str,
    *words: str | os.PathLike[str],
    cwd: str | os.PathLike[str] | None = None,
    env: dict[str, str] | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """`python -m module words...`; its output as text. Raises subprocess.TimeoutExpired."""
    command = [sys.executable, "-m", module, *(os.fspath(word) for word in words)]
    env = dict(os.environ if env is None else env)
    if not WARM:
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = start(module, *words, cwd=cwd, env=env, out=out, err=err)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, timeout, out.read_bytes(), err.read_bytes())
        return subprocess.CompletedProcess(command, process.exitcode, out.read_text(), err.read_text())


def start(
    module: str,
    *words: str | os.PathLike[str],
    out: Path,
    err: Path,
    cwd: str | os.PathLike[str] | None = None,
    env: dict[str, str] | None = None,
) -> BaseProcess:
    """`python -m module words...` as `run` has it, while we go on. out, err: files for its output."""
    command = [module, *(os.fspath(word) for word in words)]
    arguments = (command, os.fspath(cwd or os.getcwd()), dict(os.environ if env is None else env), out, err)
    context: Any = multiprocessing.get_context(METHOD)
    process = context.Process(target=_begin, args=arguments)
    process.start()
    return process


def take_environment(env: dict[str, str]) -> None:
    """A fork has the server's environment, that of whoever started a process first, and its threads."""
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(int(env.get("OMP_NUM_THREADS") or cores()))  # sums depend on it


def _begin(command: list[str], cwd: str, env: dict[str, str], out: Path, err: Path) -> None:
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(cwd)
    take_environment(env)
    multiprocessing.set_start_method(None, force=True)  # Python's own again, not that of our server
    subprocess.Popen = Forked
    _main(command)


def _main(command: Sequence[str]) -> None:
    """What Python does with the arguments `module words...` after -m, and at its end."""
    sys.argv = list(command)
    try:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()


class Forked(subprocess.Popen):
    """subprocess.Popen within a warm process: what would start `python -m MODULE ...` forks, too."""

    def _execute_child(self, *given: Any) -> None:
        start = super()._execute_child  # type: ignore[misc]
        asked = inspect.signature(start).bind(*given).arguments
        command = [word for word in asked["args"] if word != "-u"]
        pipes = [asked[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        if command[:2] != [sys.executable, "-m"] or pipes != [-1] * 3 or asked["preexec_fn"]:
            start(*given)
            return
        self.pid = os.fork()
        if not self.pid:
            _born(command[2:], asked["cwd"], asked["env"], asked["start_new_session"])
        self._child_created = True


def _born(command: list[str], cwd: str | None, env: dict[str, str] | None, session: bool) -> NoReturn:
    """The new process between fork and end, as exec leaves it."""
    if session:
        os.setsid()
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, default)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.chdir(cwd or os.getcwd())
    if env is not None:
        take_environment(dict(env))
    status = multiprocessing.Process(target=_main, args=(command,))._bootstrap()  # type: ignore[attr-defined]
    os._exit(status)

"""Independent tasks, one per shard, run by local processes, by Ray, or one part at a time.

A task is a function that pickles, and its argument. It leaves a complete shard or none
(`outputs.finished`), so how tasks are spread over machines never changes a byte.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

EXECUTORS = ("local", "ray")
Result = tuple[str, Any, str | None]  # name of the task, what it returned, or its error


@dataclass(frozen=True)
class Task:
    """`call(argument)`, both pickle; `name` is the shard, for messages."""

    name: str
    call: Callable[[Any], Any]
    argument: Any


@dataclass(frozen=True)
class Outcome:
    """Results in the order of the tasks, by name; and the errors of those that failed."""

    results: dict[str, Any] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Executor:
    """Where tasks run.

    Args:
        name: "local" (a pool of processes) or "ray".
        workers: processes of the local pool; None: one per core.
        address: of the Ray cluster; None: the one this machine belongs to, else a new local one.
        part: "i/n": only tasks i, i + n, ... (from 1), as a job array runs them.

    Raises:
        ValueError: one of them is not as above.
    """

    name: str = "local"
    workers: int | None = None
    address: str | None = None
    part: str | None = None

    def __post_init__(self) -> None:
        if self.name not in EXECUTORS:
            raise ValueError(f"--executor must be one of {', '.join(EXECUTORS)}, not {self.name!r}")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"--workers must be at least 1, not {self.workers}")
        if self.workers is not None and self.name != "local":
            raise ValueError(f"--workers {self.workers} is for --executor local; the cluster decides itself")
        if self.address is not None and self.name != "ray":
            raise ValueError(f"--address {self.address} is for --executor ray")
        self.slice()

    def slice(self) -> slice:
        """Which tasks of the list are this part's."""
        if self.part is None:
            return slice(None)
        match = re.fullmatch(r"(\d+)/(\d+)", self.part)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError(f"--part must be i/n with i from 1 to n, as in 3/8, not {self.part!r}")
        return slice(int(match[1]) - 1, None, int(match[2]))

    def run(self, tasks: Sequence[Task], what: str, gpus: int = 0) -> Outcome:
        """Run the tasks of this part. A task that fails is noted, and the others go on.

        what: of what the progress tells, e.g. "packing"; gpus: that Ray gives to a task, where the
        cluster has any.
        """
        chosen = tasks[self.slice()]
        if self.name == "ray":
            done = _on_ray(chosen, self.address, gpus)
        else:
            done = _locally(chosen, min(self.workers or os.cpu_count() or 1, len(chosen)))
        results: dict[str, Any] = {}
        failures: dict[str, str] = {}
        for name, value, error in _shown(done, what, len(chosen)):
            if error is None:
                results[name] = value
            else:
                failures[name] = error
        return Outcome(
            {task.name: results[task.name] for task in chosen if task.name in results},
            {task.name: failures[task.name] for task in chosen if task.name in failures},
        )


def _attempt(task: Task) -> Result:
    try:
        return task.name, task.call(task.argument), None
    except Exception as error:  # whatever it is, it concerns this shard alone
        known = isinstance(error, (ValueError, OSError)) and str(error)
        return task.name, None, str(error) if known else f"{type(error).__name__}: {error}"


def _locally(tasks: Sequence[Task], workers: int) -> Iterator[Result]:
    """In this process if one worker is enough, else in a pool; in the order of completion."""
    if workers <= 1:
        yield from map(_attempt, tasks)
        return
    left = list(reversed(tasks))
    while left:
        running: dict[Future[Result], Task] = {}
        try:
            with _pool(workers) as pool:
                while left or running:
                    while left and len(running) < workers:
                        running[pool.submit(_attempt, left[-1])] = left[-1]
                        left.pop()
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        yield future.result()
                        del running[future]
        except BrokenProcessPool:
            # A process died (memory?), and the pool with it. Alone, its task is told from the others.
            for task in running.values():
                yield _alone(task)


def _alone(task: Task) -> Result:
    try:
        with _pool(1) as pool:
            return pool.submit(_attempt, task).result()
    except BrokenProcessPool:
        return task.name, None, "its process died: out of memory? Try fewer --workers"


def _pool(workers: int) -> ProcessPoolExecutor:
    # Not fork: threads of torch and arrow may hold locks in this process.
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def _on_ray(tasks: Sequence[Task], address: str | None, gpus: int) -> Iterator[Result]:
    try:
        import ray
        import ray.exceptions
    except ModuleNotFoundError:
        raise ValueError("--executor ray needs Ray: pip install 'flamingo-vlm[ray]'") from None
    ours = not ray.is_initialized()
    if ours:
        ray.init(address=address, log_to_driver=False)
    try:
        held = ray.cluster_resources()
        gpus = gpus if held.get("GPU") else 0
        call = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=2)(_attempt)
        most = 4 * max(1, int(held.get("CPU", 1)))  # queued: enough to keep all busy
        left, running = list(reversed(tasks)), {}
        while left or running:
            while left and len(running) < most:
                running[call.remote(left[-1])] = left[-1]
                left.pop()
            done, _ = ray.wait(list(running), num_returns=1)
            for reference in done:
                task = running.pop(reference)
                try:
                    yield ray.get(reference)
                except ray.exceptions.RayError as error:  # its node or process died, three times
                    yield task.name, None, f"its process died on the cluster: {error}"
    finally:
        if ours:
            ray.shutdown()


def _shown(results: Iterator[Result], what: str, total: int) -> Iterator[Result]:
    """The same results; a bar on a terminal, in a pipe a line at every tenth."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(results, what, total, unit="shard")
        return
    failed = 0
    for number, result in enumerate(results, 1):
        failed += result[2] is not None
        if number == total or number * 10 // total > (number - 1) * 10 // total:
            told = f", {failed} failed" if failed else ""
            print(f"{what}: {number} of {total} shards{told}", file=sys.stderr, flush=True)
        yield result

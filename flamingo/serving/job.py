"""A file of prompts -> a file of answers, on one process or several."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm

from flamingo.folders import check_model
from flamingo.processes import check_alone, choose_gpu, end_with_parent, member, spread, together
from flamingo.serving.journal import Journal, Plan, Record
from flamingo.serving.prompt import Sampling
from flamingo.serving.requests import Request, read_requests
from flamingo.serving.styles import Style, check_style

SHARE = "FLAMINGO_GENERATE_JOB"  # the job, for the processes that share it


@dataclass(frozen=True)
class Job:
    """What is asked of which model. Its answers depend on all but batch_size."""

    model: Path
    input: Path
    output: Path
    style: Style = "few-shot"
    batch_size: int = 8
    sampling: Sampling = field(default_factory=Sampling)

    def dumped(self) -> str:
        return json.dumps(asdict(self), default=str)

    @classmethod
    def read(cls, text: str) -> Job:
        fields = json.loads(text)
        paths = {name: Path(fields.pop(name)) for name in ("model", "input", "output")}
        return cls(**paths, **{**fields, "sampling": Sampling(**fields["sampling"])})

    def plan(self) -> Plan:
        return Plan.of(self.input, self.model, self.style, self.sampling)


@dataclass(frozen=True)
class Outcome:
    """asked: prompts of this time, in `seconds`; records: all, in the order of the input."""

    asked: int
    seconds: float
    records: list[Record]

    @property
    def errors(self) -> list[Record]:
        return [record for record in self.records if "error" in record]


def run_job(job: Job, processes: int | None = None) -> Outcome | None:
    """Answers every prompt that has no answer yet, and writes the output in the order of the input.

    Started by a launcher (torchrun, deepspeed, srun), its processes share the prompts, and all but
    rank 0 return None; else so many processes are started here (None: one per GPU).
    Raises ValueError for a folder without a model, lines that cannot be asked, answers to something
    else, more processes than GPUs, or a process that failed.
    """
    check_model(job.model)
    check_style(job.style)
    if job.batch_size < 1:
        raise ValueError(f"batch_size={job.batch_size}: must be at least 1")
    if job.input.resolve() == job.output.resolve():
        raise ValueError(f"{job.output} is the input too: choose another --output")
    requests = read_requests(job.input, job.sampling)
    journal, plan = Journal(job.output), job.plan()
    rank, world = member()
    check_alone(world, processes)
    with together(rank, world) as wait:
        if rank > 0:
            wait()  # until rank 0 has claimed the output
            _work(job, requests, rank, world)
            wait()
            return None
        with journal.claimed(plan):
            open_ones = len(requests) - len(journal.answered() & {r.id for r in requests})
            began = time.monotonic()
            wait()
            if world == 1 and open_ones:
                processes = min(open_ones, processes or _default_processes())
                _check_gpus(processes)
            if world > 1 or processes == 1:
                _work(job, requests, rank, world)
            elif open_ones:
                spread("flamingo.serving", processes or 1, **{SHARE: job.dumped()})
            wait()
            return Outcome(open_ones, time.monotonic() - began, journal.finish(requests))


def _default_processes() -> int:
    """One per GPU. On a CPU one, whose threads have all cores: a second would load the model again."""
    import torch

    return max(1, torch.cuda.device_count()) if torch.cuda.is_available() else 1


def _check_gpus(processes: int) -> None:
    import torch

    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise ValueError(
            f"processes={processes}, but this machine shows {torch.cuda.device_count()} GPUs: each process "
            "needs one"
        )


def _work(job: Job, requests: list[Request], rank: int, world: int) -> None:
    """One process: its share of the prompts. Prompts that follow each other often share pictures, so a
    share is a piece of the file, the same however much of it is answered."""
    mine = requests[rank * len(requests) // world : (rank + 1) * len(requests) // world]
    journal = Journal(job.output)
    journal.check(job.plan())
    answered = journal.answered()
    todo = [request for request in mine if request.id not in answered]
    if not todo:
        return
    from flamingo.runtime import tune_cpu
    from flamingo.serving.batch import Batcher
    from flamingo.serving.engine import Engine

    with journal.part(rank) as add:
        choose_gpu(rank)
        batcher = Batcher(Engine(job.model), job.batch_size, job.style)
        tune_cpu(processes=min(world, int(os.environ.get("LOCAL_WORLD_SIZE", world))))
        said = "answers" if world == 1 else f"answers of process 1 of {world}"
        quiet = rank > 0 or not sys.stderr.isatty()
        done = len(mine) - len(todo)
        with tqdm(total=len(mine), initial=done, desc=said, unit="prompt", disable=quiet) as bar:
            for records in batcher.answers(todo):
                add(records)
                bar.update(len(records))


def share(text: str) -> None:
    """One of the processes that `run_job` started."""
    end_with_parent()
    job = Job.read(text)
    _work(job, read_requests(job.input, job.sampling), *member())

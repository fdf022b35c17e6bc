"""A whole evaluation: share the queries among processes, collect, draw the gallery."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from flamingo.eval.config import EvalConfig
from flamingo.eval.run import Part
from flamingo.eval.task import Task
from flamingo.runtime import default_processes, short_attention, tune_cpu

PLAN = "plan.json"
SHARE = "FLAMINGO_EVAL_ANSWERS"  # the folder of answers, for processes that `_spread` starts


@dataclass(frozen=True)
class Plan:
    """What all processes of an evaluation do; kept beside its answers."""

    model: str
    fingerprint: str
    config: EvalConfig

    @classmethod
    def read(cls, folder: Path) -> Plan:
        fields = json.loads((folder / PLAN).read_text())
        return cls(fields["model"], fields["fingerprint"], EvalConfig(**fields["config"]))

    def claim(self, folder: Path) -> None:
        """Raises ValueError, naming what differs, when the folder holds answers to something else."""
        held = folder / PLAN
        if held.exists():
            self._compare(json.loads(held.read_text()), folder)
        folder.mkdir(parents=True, exist_ok=True)
        scratch = held.with_suffix(".part")
        scratch.write_text(json.dumps(self.fields(), indent=1) + "\n")
        scratch.replace(held)

    def fields(self) -> dict[str, Any]:
        return {**asdict(self), "config": self.config.model_dump(mode="json")}

    def _compare(self, before: dict[str, Any], folder: Path) -> None:
        old, new = ({**f.pop("config", {}), **f} for f in (before, self.fields()))
        differ = [n for n in new if new[n] != old.get(n) and n != "tokens_per_batch"]  # a smaller one fits
        if not differ:
            return
        said = "; ".join(f"{name} was {old.get(name)!r}, is {new[name]!r}" for name in differ)
        raise ValueError(
            f"{folder} holds answers of another model or other settings ({said}): "
            "choose another --out, or --overwrite to delete them"
        )


def fingerprint(model: Path) -> str:
    """Tells one model folder from another: digest of its config, and size and time of weights."""
    digest = hashlib.sha256((model / "config.json").read_bytes())
    for file in sorted(model.glob("*.safetensors")):
        stat = file.stat()
        digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def evaluate(
    model: Path, out: Path, config: EvalConfig, processes: int | None = None, overwrite: bool = False
) -> dict:
    """Evaluate a model folder; writes eval.json, gallery.json, eval.html and answers/ into `out`.

    Started by a launcher (torchrun, deepspeed, srun), its processes share the queries, and this returns
    on all of them what rank 0 collected ({} on the others); else so many processes are started here.
    Raises ValueError for a folder without a model, data that is not there, or foreign answers.
    """
    if not (model / "config.json").is_file():
        raise ValueError(f"{model} holds no model (no config.json): train one, or name its folder")
    rank, world = member()
    answers = out / "answers"
    began = time.monotonic()
    plan = Plan(str(model.resolve()), fingerprint(model), config)
    with _together(rank, world) as wait:
        if rank == 0:
            if overwrite:
                shutil.rmtree(answers, ignore_errors=True)
            Task.of(config)  # what is wrong with the data is said once, before processes start
            plan.claim(answers)
        wait()
        if world > 1:
            work(answers, rank, world)
        else:
            _spread(answers, processes or default_processes())
        wait()
        return _collect(model, out, answers, config, time.monotonic() - began) if rank == 0 else {}


def _collect(model: Path, out: Path, answers: Path, config: EvalConfig, seconds: float) -> dict:
    from flamingo.eval.gallery import gallery
    from flamingo.eval.results import page
    from flamingo.eval.results.summary import summarise

    task = Task.of(config)
    summary = summarise(task, config, answers, seconds)
    summary |= {"model": str(model), "fingerprint": fingerprint(model)}
    (out / "eval.json").write_text(json.dumps(summary, indent=1) + "\n")
    (out / "gallery.json").write_text(json.dumps(gallery(model, task, config, answers)))
    page.write(out)
    return summary


def member() -> tuple[int, int]:
    """(rank, world size) that a launcher announced; (0, 1) without one. A Slurm job whose batch script
    calls this without srun has one process."""
    names = [("RANK", "WORLD_SIZE")]
    if {"SLURM_STEP_ID", "SLURM_STEPID"} & os.environ.keys():
        names.append(("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))
    for rank, world in names:
        if rank in os.environ and world in os.environ:
            return int(os.environ[rank]), int(os.environ[world])
    return 0, 1


@contextmanager
def _together(rank: int, world: int) -> Iterator[Any]:
    """Gives a function that waits for all processes of a launcher; alone, nobody waits.

    Raises ValueError where the launcher did not say at which address they meet.
    """
    if world == 1:
        yield lambda: None
        return
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise ValueError(
            f"{world} processes, but {' and '.join(missing)} not set: export the first node's name and a "
            "free port before srun; torchrun and deepspeed do it by themselves"
        )
    import torch.distributed as dist

    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(days=7))
    try:
        yield dist.barrier
    finally:
        dist.destroy_process_group()


def _spread(answers: Path, processes: int) -> None:
    """Run the parts side by side; when one fails, stop the others and say so."""
    children = []
    for rank in range(processes):
        env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(processes), SHARE: str(answers)}
        children.append(subprocess.Popen([sys.executable, "-m", "flamingo.eval"], env=env))
    try:
        while any(child.poll() is None for child in children):
            if any(child.poll() for child in children):
                break
            time.sleep(0.1)
    finally:
        for child in children:
            if child.poll() is None:
                child.terminate()
            child.wait()
    failed = [child.returncode for child in children if child.returncode]
    if failed:
        raise ValueError(f"an evaluation process ended with status {failed[0]}; its message is above")


def work(answers: Path, rank: int, world: int) -> None:
    """One process: its share of the plan in the folder of answers."""
    from flamingo.eval.predictor import Predictor

    _choose_gpu(rank)
    tune_cpu(processes=min(world, int(os.environ.get("LOCAL_WORLD_SIZE", world))))
    plan = Plan.read(answers)
    config, task = plan.config, Task.of(plan.config)
    with short_attention():
        predictor = Predictor(
            plan.model,
            max_new_tokens=config.max_new_tokens or task.benchmark.MAX_NEW_TOKENS,
            beams=config.beams,
            tokens_per_batch=config.tokens_per_batch,
        )
        if config.shots_from == "similar":
            from flamingo.eval import retrieval

            task.neighbours = retrieval.neighbours(config, task, predictor, rank, world)
        part = Part(task, config, predictor, answers, rank, world)
        for setting in config.settings():
            part.run(setting)


def _choose_gpu(rank: int) -> None:
    import torch

    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", rank)))
        torch.cuda.set_device(local % torch.cuda.device_count())

"""A whole evaluation: share the queries among processes, collect, draw the gallery."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flamingo.eval.config import EvalConfig
from flamingo.eval.run import Part
from flamingo.eval.task import Task
from flamingo.folders import check_model
from flamingo.processes import check_alone, choose_gpu, member, spread, together
from flamingo.runtime import default_processes, short_attention, tune_cpu

PLAN = "plan.json"
SHARE = "FLAMINGO_EVAL_ANSWERS"  # the folder of answers, for the processes that share it


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
    check_model(model)
    rank, world = member()
    check_alone(world, processes)
    answers = out / "answers"
    began = time.monotonic()
    plan = Plan(str(model.resolve()), fingerprint(model), config)
    with together(rank, world) as wait:
        if rank == 0:
            if overwrite:
                shutil.rmtree(answers, ignore_errors=True)
            Task.of(config)  # what is wrong with the data is said once, before processes start
            plan.claim(answers)
        wait()
        if world > 1:
            work(answers, rank, world)
        else:
            spread("flamingo.eval", processes or default_processes(), **{SHARE: str(answers)})
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


def work(answers: Path, rank: int, world: int) -> None:
    """One process: its share of the plan in the folder of answers."""
    from flamingo.eval.predictor import Predictor

    choose_gpu(rank)
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

"""A whole evaluation: share the queries among processes, collect, draw the gallery."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from flamingo.eval import benchmarks, run
from flamingo.eval.few_shot import Setting
from flamingo.runtime import default_processes, quiet_libraries, short_attention, tune_cpu

PLAN = "plan.json"


@dataclass(frozen=True)
class Plan:
    """What all processes of an evaluation do; kept beside its answers."""

    benchmark: str
    model: str
    fingerprint: str
    settings: list[Setting]

    @classmethod
    def read(cls, folder: Path) -> Plan:
        fields = json.loads((folder / PLAN).read_text())
        fields["settings"] = [Setting(**setting) for setting in fields["settings"]]
        return cls(**fields)

    def claim(self, folder: Path) -> None:
        """Raises ValueError when the folder holds answers to something else."""
        held = folder / PLAN
        if held.exists() and Plan.read(folder) != self:
            raise ValueError(
                f"{folder} holds answers of another model or other settings: "
                "choose another --out, or --overwrite to delete them"
            )
        folder.mkdir(parents=True, exist_ok=True)
        held.write_text(json.dumps(asdict(self), indent=1) + "\n")


def evaluate(
    model: Path,
    out: Path,
    benchmark: str = "easy_vqa",
    control_limit: int | None = 2000,
    query_limit: int | None = None,
    processes: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> dict:
    """Evaluate a model folder; writes eval.json, gallery.json and answers/ into `out`.

    Raises ValueError for a folder without a model, an unknown benchmark, or foreign answers.
    """
    if not (model / "config.json").is_file():
        raise ValueError(f"{model} holds no model (no config.json): train one, or name its folder")
    benchmarks.load(benchmark)
    answers = out / "answers"
    if overwrite:
        shutil.rmtree(answers, ignore_errors=True)
    chosen = run.settings(seed, control_limit, query_limit)
    plan = Plan(benchmark, str(model.resolve()), run.fingerprint(model), chosen)
    plan.claim(answers)
    began = time.monotonic()
    _spread(answers, processes or default_processes())
    summary = run.collect(benchmark, answers, chosen, time.monotonic() - began)
    (out / "gallery.json").write_text(json.dumps(_gallery(model, benchmark, answers, chosen[0])))
    (out / "eval.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def _spread(answers: Path, processes: int) -> None:
    """Run the parts side by side; when one fails, stop the others and say so."""
    children = []
    for rank in range(processes):
        env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(processes)}
        env["FLAMINGO_EVAL_ANSWERS"] = str(answers)
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


def main(rank: int, world: int) -> int:
    """One process: its share of the plan in the folder that the parent named."""
    quiet_libraries()
    folder = os.environ.get("FLAMINGO_EVAL_ANSWERS")
    if folder is None:
        print("error: python -m flamingo.eval is started by `flamingo eval`", file=sys.stderr)
        return 1
    _choose_gpu(rank)
    tune_cpu(processes=world)
    plan = Plan.read(Path(folder))
    try:
        with short_attention():
            run.run_part(plan.benchmark, Path(plan.model), Path(folder), plan.settings, rank, world)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _choose_gpu(rank: int) -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())


def _gallery(model: Path, benchmark: str, answers: Path, setting: Setting) -> list[dict]:
    from flamingo.eval.gallery import gallery
    from flamingo.eval.predictor import Predictor

    records = run.read_answers(run.answer_files(answers, setting))
    return gallery(Predictor(model), benchmarks.load(benchmark), records)

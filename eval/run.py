"""Runs settings of a benchmark: each query exactly once, on one process or several.

Every process takes its share of the queries and writes its answers as they come; results of an
interrupted evaluation are kept and not computed again. Processes need not talk to each other.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from tqdm import tqdm

from flamingo.eval import benchmarks
from flamingo.eval.few_shot import Setting, build, sample

POOL = 2048  # demonstrations that shots are drawn from, as in the papers' support sets


def settings(seed: int, control_limit: int | None, query_limit: int | None) -> list[Setting]:
    """What a report needs: 0 shots on all queries, 4 shots and the controls on a sample."""
    limit = min((x for x in (control_limit, query_limit) if x is not None), default=None)
    return [
        Setting(0, None, query_limit, seed),
        Setting(0, "blank", limit, seed),
        Setting(4, None, limit, seed),
        Setting(4, "text_only_shots", limit, seed),
    ]


def fingerprint(model: Path) -> str:
    """Tells one model folder from another: digest of its config, and size and time of weights."""
    digest = hashlib.sha256((model / "config.json").read_bytes())
    for file in sorted(model.glob("*.safetensors")):
        stat = file.stat()
        digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def answers_file(out: Path, setting: Setting, rank: int) -> Path:
    return out / f"{setting.slug}.{rank}.jsonl"


def answer_files(out: Path, setting: Setting) -> list[Path]:
    return sorted(out.glob(f"{setting.slug}.[0-9]*.jsonl"))


def _drop_cut_line(path: Path) -> None:
    """An interrupted process may have left half a line, which the next would be written onto."""
    if path.exists() and not path.read_text().endswith("\n"):
        whole = path.read_text().rpartition("\n")
        scratch = path.with_suffix(".part")
        scratch.write_text(whole[0] + whole[1])
        scratch.replace(path)


def run_part(
    benchmark_name: str, model: Path, out: Path, chosen: Sequence[Setting], rank: int, world: int
) -> None:
    """Answer this process's share of every setting; one JSON line per query."""
    from flamingo.eval.predictor import Predictor

    benchmark, predictor = benchmarks.load(benchmark_name), Predictor(model)
    queries = benchmark.queries()
    pool = sample(benchmark.demonstrations(), Setting(limit=POOL))
    for setting in chosen:
        path = answers_file(out, setting, rank)
        _drop_cut_line(path)
        # Of any earlier process: shares never overlap, however many processes there were.
        done = {record["id"] for record in read_answers(answer_files(out, setting))}
        # Questions about a picture follow each other: one process encodes it.
        whole = sample(queries, setting)
        mine = whole[rank * len(whole) // world : (rank + 1) * len(whole) // world]
        todo = [query for query in mine if query.id not in done]
        began = time.monotonic()
        prompts = [build(benchmark, pool, query, setting) for query in todo]
        quiet = rank > 0 or not sys.stderr.isatty()
        with (
            path.open("a") as file,
            tqdm(
                total=len(mine), initial=len(mine) - len(todo), desc=setting.name, unit="query", disable=quiet
            ) as bar,
        ):
            for prompt, prediction in predictor.predict(prompts):
                example = prompt.example
                record = {
                    "id": example.id,
                    "question": example.question,
                    "answer": list(example.answers),
                    "prediction": prediction,
                    "score": benchmark.score(prediction, example),
                    "kind": example.kind,
                    "image": str(example.image),
                }
                file.write(json.dumps(record) + "\n")
                bar.update()
        if rank == 0 and quiet and todo:
            rate = len(todo) / (time.monotonic() - began)
            print(f"{setting.name}: {len(mine)} queries, {rate:.1f}/s in each process", flush=True)


def read_answers(paths: Iterable[Path]) -> list[dict]:
    """Records of the files that are there; a last line that was cut off is left out."""
    records = []
    for path in paths:
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                records.append(json.loads(line))
            except ValueError:
                break
    return records


def collect(benchmark_name: str, out: Path, chosen: Sequence[Setting], seconds: float) -> dict:
    """All processes' answers as one summary; raises ValueError unless each query is there once."""
    benchmark = benchmarks.load(benchmark_name)
    queries = benchmark.queries()
    summary = {
        "benchmark": benchmark_name,
        "description": benchmark.DESCRIPTION,
        "blind_accuracy": benchmark.BLIND_ACCURACY,
        "seconds": round(seconds, 1),
        "settings": {},
    }
    for setting in chosen:
        records = read_answers(answer_files(out, setting))
        wanted = {query.id for query in sample(queries, setting)}
        found = [record["id"] for record in records]
        if len(found) != len(wanted) or set(found) != wanted:
            raise ValueError(
                f"{out}: {setting.name} has {len(found)} answers to {len(set(found))} questions, "
                f"{len(wanted)} were asked; delete the folder and run again"
            )
        summary["settings"][setting.name] = summarise(setting, records)
    return summary


def summarise(setting: Setting, records: list[dict]) -> dict:
    """Accuracy, its interval and the accuracy of each question kind."""
    kinds: dict[str, list[float]] = defaultdict(list)
    for record in records:
        kinds[record["kind"]].append(record["score"])
    scores = [record["score"] for record in records]
    return {
        "shots": setting.shots,
        "control": setting.control,
        "n": len(scores),
        "accuracy": round(sum(scores) / len(scores), 6),
        "interval": wilson(sum(scores), len(scores)),
        "by_kind": {
            kind: {"n": len(s), "accuracy": round(sum(s) / len(s), 6)} for kind, s in sorted(kinds.items())
        },
    }


def wilson(right: float, total: int, z: float = 1.96) -> list[float]:
    """95 % interval of a share (Wilson 1927): sound at 0 and 1, unlike the normal one."""
    share, spread = right / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z * ((share * (1 - share) + spread / 4) / total) ** 0.5 / (1 + spread)
    return [round(max(0.0, middle - half), 6), round(min(1.0, middle + half), 6)]

"""python -m flamingo.eval.tasks: where the tasks are, and tasks of other benchmarks."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from flamingo.data.tools.commands import plain_errors
from flamingo.eval import hub
from flamingo.eval.config import SHOTS
from flamingo.eval.tasks import BASE, FOLDER

app = typer.Typer(help="Few-shot tasks for lmms-eval.", no_args_is_help=True, pretty_exceptions_enable=False)


@app.command()
def folder() -> None:
    """Print the folder of the tasks that need no data: lmms-eval --include_path takes it."""
    typer.echo(str(FOLDER))


@app.command()
def write(
    out: Annotated[Path, typer.Argument(help="Folder for the tasks.")],
    benchmark: Annotated[str, typer.Option(help="A name (flamingo eval describe), or a dotted module.")],
    data: Annotated[Path | None, typer.Option(help="Folder of its official files, or hub.")] = None,
    shots: Annotated[list[int] | None, typer.Option(min=0, help="Default: 0, 4, 8, 16, 32.")] = None,
    shots_from: Annotated[str, typer.Option(help="random: anew per query; fixed: the same.")] = "random",
    split: Annotated[str | None, typer.Option(help="Split that is asked. Default: the benchmark's.")] = None,
    seed: Annotated[int, typer.Option(help="Decides the shots.")] = 0,
    choice: Annotated[bool, typer.Option(help="Rank the answers by likelihood.")] = False,
) -> None:
    """Write the tasks of a benchmark, one for each number of shots: a YAML and a JSON file each."""
    with plain_errors():
        place = data if data is None or hub.asked(data) else data.resolve()
        given = {"data": place and str(place), "split": split, "shots_from": shots_from}
        for name in write_tasks(out, benchmark, shots or list(SHOTS), seed, choice, given):
            typer.echo(name)


def write_tasks(
    out: Path, benchmark: str, shots: list[int], seed: int, choice: bool, given: dict[str, Any]
) -> list[str]:
    """The names of the tasks. Raises ValueError for settings or data that an evaluation would refuse."""
    from flamingo.eval import benchmarks
    from flamingo.eval.tasks.few_shot import opened

    module = benchmarks.load(benchmark)
    choice = choice or not module.MAX_NEW_TOKENS
    if given.get("shots_from") == "similar":
        raise ValueError("shots_from='similar': tasks of lmms-eval have no index; choose random or fixed")
    defaults = {"shots_from": "random"}
    kept = {k: v for k, v in given.items() if v is not None and v != defaults.get(k)}
    names: list[str] = []
    for count in sorted(set(shots), reverse=True):
        settings = {"benchmark": benchmark, "shots": count, "seed": seed, "choice": choice, **kept}
        if not names:  # what is wrong is said now, and before anything is written
            opened(json.dumps(settings, sort_keys=True))
            _begin(out)
        name = f"{benchmark.rpartition('.')[2].replace('-', '_')}_{count}shot" + "_choice" * choice
        (out / f"{name}.json").write_text(json.dumps(settings) + "\n")
        task = described(f"flamingo_{name}", f"{name}.json", module, choice)
        (out / f"{name}.yaml").write_text(task)
        names.append(f"flamingo_{name}")
    return names[::-1]


def _begin(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    if out.resolve() != FOLDER.resolve():
        shutil.copyfile(FOLDER / BASE, out / BASE)


def described(name: str, file: str, module: Any, choice: bool) -> str:
    """The YAML of a task."""
    task: dict[str, Any] = {
        "include": BASE,
        "task": name,
        "tag": re.sub(r"_\d+shot", "", name),
        "dataset_kwargs": {"data_files": {"test": file}},
    }
    if choice:
        task |= {"output_type": "multiple_choice"}
    else:
        options = {"max_new_tokens": module.MAX_NEW_TOKENS, "num_beams": 3, "do_sample": False, "until": []}
        task |= {"output_type": "generate_until", "generation_kwargs": options}
    functions = "!function flamingo.eval.tasks.few_shot"
    lines = [f"doc_to_choice: {functions}.choices"] if choice else []
    lines += ["metric_list:"]
    for metric in module.METRICS:
        lines += [f"  - metric: {metric}", f"    aggregation: {functions}.aggregate"]
        lines += ["    higher_is_better: true"]
    return yaml.safe_dump(task, sort_keys=False) + "\n".join(lines) + "\n"


if __name__ == "__main__":
    app()

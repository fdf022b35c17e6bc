"""`flamingo eval ...`: describe a benchmark's data, build an index, run, compare."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from flamingo.data.tools.commands import plain_errors

app = typer.Typer(
    help="Few-shot evaluation: describe a benchmark, index its demonstrations, run, compare.",
    no_args_is_help=True,
)

Data = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the benchmark's official files; or hub, hub:owner/name, hub:FOLDER: "
        "a copy in Hugging Face's format."
    ),
]


@app.command()
def run(
    model: Annotated[Path, typer.Argument(help="Model folder, e.g. runs/quickstart/model.")],
    benchmark: Annotated[str, typer.Option(help="A name (flamingo eval describe), or a dotted module.")],
    out: Annotated[Path | None, typer.Option(help="Where results go. Default: beside the model.")] = None,
    data: Data = None,
    split: Annotated[str | None, typer.Option(help="Split that is asked. Default: the benchmark's.")] = None,
    shots: Annotated[
        list[int] | None, typer.Option(min=0, help="Give it several times. Default: 0, 4, 8, 16, 32.")
    ] = None,
    shots_from: Annotated[
        str, typer.Option(help="random: anew per query; fixed: the same for all; similar: RICES.")
    ] = "random",
    zero_shot: Annotated[
        str, typer.Option(help="With 0 shots: text, two without pictures as in the papers; none.")
    ] = "text",
    pool: Annotated[int, typer.Option(min=1, help="Demonstrations that shots are drawn from.")] = 2048,
    trials: Annotated[int, typer.Option(min=1, help="Seeds, each with other shots.")] = 1,
    seed: Annotated[int, typer.Option(help="The first seed: decides samples and shots.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Queries, a fixed sample.")] = None,
    shots_limit: Annotated[int | None, typer.Option(min=1, help="Queries where there are shots.")] = None,
    control_limit: Annotated[int, typer.Option(min=0, help="Queries of each control; 0: none.")] = 2000,
    control_shots: Annotated[
        int | None, typer.Option(min=2, help="Shots of the controls. Default: the fewest above 1.")
    ] = None,
    beams: Annotated[int, typer.Option(min=1, help="Beam search; the papers' is 3.")] = 3,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Default: the benchmark's.")] = None,
    ensemble: Annotated[int, typer.Option(min=1, help="Orders of the shots put together.")] = 1,
    calibrate: Annotated[
        bool, typer.Option(help="Class likelihoods relative to those of a blank picture.")
    ] = False,
    index: Annotated[
        str | None, typer.Option(help="Folder of `flamingo eval index`, or Milvus: FILE.db or an address.")
    ] = None,
    similarity: Annotated[str, typer.Option(help="What is compared: image, text or both.")] = "image",
    tokens_per_batch: Annotated[int, typer.Option(min=1, help="More needs more memory.")] = 2048,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Default: one per GPU; on a CPU, two.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Delete answers that are there.")] = False,
) -> None:
    """Evaluate a model few-shot, with controls that show whether pictures matter.

    Writes eval.html, eval.json and the answers, one line each. Stopped, the
    same command goes on. Under torchrun, deepspeed or srun, the processes that
    those start share the queries: torchrun -m flamingo.eval MODEL ...
    """
    given = {name: value for name, value in locals().items() if value is not None}
    with plain_errors():
        folder = out or model.parent / "eval" / benchmark.rpartition(".")[2]
        _show(_run(model, folder, given, processes, overwrite), folder)


def _run(model: Path, out: Path, given: dict[str, Any], processes: int | None, overwrite: bool) -> dict:
    from flamingo.runtime import quiet_libraries

    quiet_libraries()  # first: what is imported below brings the libraries in
    import pydantic

    from flamingo.eval.config import EvalConfig, explained
    from flamingo.eval.session import evaluate

    try:
        config = EvalConfig(**{name: given[name] for name in EvalConfig.model_fields if name in given})
    except pydantic.ValidationError as error:
        raise ValueError(explained(error)) from None
    return evaluate(model, out, config, processes, overwrite)


def _show(summary: dict, folder: Path) -> None:
    """One line per setting: the score, its interval, how many queries."""
    if not summary:
        return  # not rank 0 of a launcher
    first = summary["metrics"][0]
    typer.echo(f"{summary['title']}, {first['title']}")
    for setting in summary["settings"]:
        figures = setting["metrics"].get(first["name"])
        if figures is None:
            typer.echo(f"{setting['name']:44} not scored: {setting['note']}")
            continue
        low, high = (first["scale"] * bound for bound in figures["interval"])
        value, many = first["scale"] * figures["value"], setting["n"] * len(setting["seeds"])
        typer.echo(f"{setting['name']:44} {value:7.2f}  ({low:.1f} to {high:.1f}, {many:,} answers)")
    typer.echo(f"{folder / 'eval.json'}")


@app.command()
def describe(
    name: Annotated[str | None, typer.Argument(help="A benchmark. Without: all of them.")] = None,
    data: Data = None,
) -> None:
    """Which files a benchmark needs, from where, with which licence; with --data, whether they are there."""
    from flamingo.eval.benchmarks._describe import describe as said

    with plain_errors():
        text, complete = said(name, data)
        typer.echo(text)
        if not complete:
            raise typer.Exit(1)


@app.command()
def compare(
    one: Annotated[Path, typer.Argument(help="Folder of an evaluation.")],
    other: Annotated[Path, typer.Argument(help="Another, of the same benchmark.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for eval-compare.html. Default: the first's.")
    ] = None,
) -> None:
    """Two evaluations of one benchmark, query by query: which differences are more than chance."""
    from flamingo.eval.results.compare import compare as compared

    with plain_errors():
        typer.echo(compared(one, other, out))


@app.command()
def index(
    benchmark: Annotated[str, typer.Argument(help="A name (flamingo eval describe), or a dotted module.")],
    out: Annotated[
        str, typer.Option(help="Folder, or Milvus: FILE.db, http://HOST:19530; #NAME names the collection.")
    ],
    data: Data = None,
    encoder: Annotated[
        str, typer.Option(help="open_clip:ARCHITECTURE/WEIGHTS, or model:FOLDER, a Flamingo's own.")
    ] = "open_clip:ViT-B-32/openai",
    similarity: Annotated[
        str, typer.Option(help="What is compared: image, text, or both, which serves all three.")
    ] = "image",
    pool: Annotated[int, typer.Option(min=1, help="Demonstrations, as `flamingo eval run` draws.")] = 2048,
    rebuild: Annotated[bool, typer.Option(help="Replace an index of other data or encoder.")] = False,
) -> None:
    """Index a benchmark's demonstrations, for --shots-from similar: shots that resemble their query.

    Vectors are kept by content: interrupted, it goes on; with new data, only
    what is new is computed. FLAMINGO_MILVUS_TOKEN is the token of a Milvus.
    """
    from flamingo.runtime import quiet_libraries, tune_cpu

    quiet_libraries()
    from flamingo.eval.retrieval import build_index

    tune_cpu()
    with plain_errors():
        address, made = build_index(benchmark, data, out, encoder, similarity, pool, rebuild)
        typer.echo(f"{made.examples:,} demonstrations, {made.rows:,} vectors of {made.width}: {address}")
        words = ["--benchmark", benchmark, "--shots-from", "similar", "--similarity", similarity]
        words += ["--pool", str(pool), "--index", address, *(["--data", str(data)] if data else [])]
        typer.echo(f"flamingo eval run MODEL {shlex.join(words)}")

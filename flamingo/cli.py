"""`flamingo ...`: one command, whose parts import what is heavy only when they run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flamingo.checkpoints.commands import app as convert_app
from flamingo.data.commands import app as data_app
from flamingo.data.tools import commands as tools
from flamingo.data.tools.commands import plain_errors
from flamingo.eval.clip.commands import app as clip_app
from flamingo.eval.commands import app as eval_app
from flamingo.serving import commands as serving
from flamingo.serving.demo.command import demo
from flamingo.train.contrastive.commands import train as train_encoder
from flamingo.train.options import AcceptChangedShards, Processes, Resume

app = typer.Typer(
    help="Flamingo: a frozen language model that sees. Make data, train, evaluate, ask.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")
app.add_typer(convert_app, name="convert")
app.add_typer(eval_app, name="eval")
app.add_typer(clip_app, name="clip")
clip_app.command("train")(train_encoder)
app.command()(serving.generate)
app.command()(serving.chat)
app.command()(demo)


@app.command()
def backbones(
    out: Annotated[Path, typer.Argument(help="Folder for the converted weights.")] = Path("data/backbones"),
) -> None:
    """Convert the embedded frozen backbones (SmolLM2-135M-Instruct, EfficientNet-Lite0) once."""
    from flamingo.runtime import quiet_libraries

    quiet_libraries()
    from flamingo.backbones import prepare

    with plain_errors():
        prepare(out, typer.echo)


@data_app.command("features")
def features(
    shards: Annotated[list[str], typer.Argument(help="Tars, globs or ranges, e.g. 'pairs-{000..009}.tar'.")],
    model: Annotated[Path, typer.Option(help="Model folder whose encoder is used (flamingo create).")],
    out: Annotated[Path, typer.Option(help="Folder for the features; to go on, the same again.")],
    kind: tools.Kind = "pairs",
    options: tools.KindOptions = "{}",
    executor: tools.Where = "local",
    workers: tools.Workers = None,
    address: tools.Address = None,
    part: tools.Part = None,
) -> None:
    """Run the frozen encoder once over all pictures and keep its patch grids as shards.

    A recipe that names the folder (`features: FOLDER`) trains without decoding
    and encoding these pictures. It pays when every picture is seen more often
    than once or twice, or by several runs, and there is room for the grids.
    """
    from flamingo.runtime import quiet_libraries

    quiet_libraries()
    from flamingo.features import write_features

    with plain_errors():
        run_on = tools.executor_of(executor, workers, address, part)
        outcome = write_features(model, shards, kind, tools.options_of(options), out, run_on)
        pictures, bad = (sum(t[n] for t in outcome.results.values()) for n in ("samples", "bad_samples"))
        typer.echo(f"{out}: {pictures} pictures in {len(outcome.results)} shards; {bad} bad samples left out")
        tools.failed(outcome.failures)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="YAML recipe; see train/recipes.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, e.g. steps=100 optimizer.lr=1e-4.")
    ] = None,
    resume: Resume = False,
    processes: Processes = None,
    accept_changed_shards: AcceptChangedShards = False,
) -> None:
    """Train as a recipe says, on all GPUs or on two CPU processes, with DeepSpeed's launcher."""
    from flamingo.train.launch import launch

    with plain_errors():
        raise typer.Exit(launch(recipe, overrides or [], resume, processes, accept_changed_shards))


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="YAML recipe; see train/recipes.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, e.g. activation_checkpointing=true.")
    ] = None,
    gpus: Annotated[int, typer.Option(help="GPUs of the run.")] = 1,
    gpu_memory: Annotated[float, typer.Option(help="Memory of one of them in GiB.")] = 80.0,
    utilisation: Annotated[float, typer.Option(help="Share of the peak that the run will reach.")] = 0.4,
    peak: Annotated[
        float | None,
        typer.Option(help="TFLOP/s of a GPU. Default: measured; without a GPU, an A100's."),
    ] = None,
    images: Annotated[
        list[str] | None, typer.Option(help="SOURCE=N: images of a document of this source.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON, memory in bytes.")] = False,
) -> None:
    """Before paying: parameters, memory per ZeRO stage and micro-batch, time and GPU-hours of a recipe."""
    from flamingo.runtime import quiet_libraries

    quiet_libraries()
    from flamingo.train.planning.commands import run

    with plain_errors():
        run(recipe, overrides or [], gpus, gpu_memory, utilisation, peak, images or [], as_json)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, e.g. runs/quickstart.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for a comparison. Default: the first run's.")
    ] = None,
) -> None:
    """Write report.html and report.json of a run: figures, curves, and where the model looked.

    Of several runs, of one that goes on or was stopped, and of an encoder (`flamingo clip train`):
    compare.html and compare.json, the curves over each other, the final figures and the settings
    that differ.
    """
    from flamingo.eval.compare import write_comparison
    from flamingo.eval.report import has_page, write_report

    with plain_errors():
        one = len(runs) == 1 and out is None and has_page(runs[0])
        typer.echo(f"{write_report(runs[0]) if one else write_comparison(runs, out)}")


@app.command()
def create(
    out: Annotated[Path, typer.Argument(help="Folder for the model; must not be there yet.")],
    vision: Annotated[str, typer.Option(help="Frozen encoder, e.g. open_clip:ViT-L-14/openai.")],
    language: Annotated[str, typer.Option(help="Frozen causal LM: a name or a local folder.")],
    fields: Annotated[
        list[str] | None, typer.Argument(help="key=value of FlamingoConfig, e.g. resampler_depth=2.")
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(help="bfloat16, float32, or auto: what this machine computes fast."),
    ] = "auto",
) -> None:
    """Assemble an untrained model from a frozen encoder and a frozen language model."""
    from flamingo.runtime import quiet_libraries

    quiet_libraries()
    from flamingo.folders import assemble

    with plain_errors():
        typer.echo(assemble(out, vision, language, fields or [], dtype))


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="Run folder, or a model folder.")],
    out: Annotated[Path, typer.Argument(help="Model folder to write; of a model folder, a file.")],
) -> None:
    """Write a run's newest checkpoint as a model folder, or a model's trained part alone.

    Of a run (runs/mine): a folder for `from_pretrained`, adapters merged, read
    again and compared. Of a model folder (runs/mine/model): one safetensors
    file without the frozen backbones.
    """
    from flamingo.runtime import quiet_libraries

    quiet_libraries()
    with plain_errors():
        if (source / "recipe.yaml").is_file():
            from flamingo.train.export import export_run

            typer.echo(f"{out}: the model after step {export_run(source, out)}")
            return
        from flamingo.checkpoints.trainables import save_trainables
        from flamingo.folders import check_model
        from flamingo.modeling import FlamingoForConditionalGeneration

        check_model(source)
        size = save_trainables(FlamingoForConditionalGeneration.from_pretrained(source), out)
        typer.echo(f"{out}: {size / 1e6:.1f} MB")


@app.command()
def quickstart(
    run: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/quickstart"),
    data: Annotated[Path, typer.Option(help="Folder for backbones and shards.")] = Path("data"),
    steps: Annotated[int | None, typer.Option(min=1, help="Fewer steps end sooner.")] = None,
) -> None:
    """The main job on the embedded default: data, training, evaluation, report."""
    from flamingo.runtime import quiet_libraries

    quiet_libraries()
    from flamingo.quickstart import main

    with plain_errors():
        main(run, data, steps, typer.echo)


if __name__ == "__main__":
    app()

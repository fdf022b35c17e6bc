"""`flamingo data pack | index | verify | stats | show | convert`: options, and what is said at the end."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from flamingo.data.tools.executors import Executor
    from flamingo.data.tools.planning import Layout, Made

SHOWN = 20  # faults that are printed; the JSON report has all

Shards = Annotated[list[str], typer.Argument(help="Tars, globs or ranges, e.g. 'pairs-{000..009}.tar'.")]
Kind = Annotated[str, typer.Option(help="Kind of the samples: a file of flamingo/data/kinds, or a module.")]
KindOptions = Annotated[str, typer.Option(help="Options of the kind, e.g. '{min_side: 64}'.")]
Where = Annotated[str, typer.Option("--executor", help="local: processes of this machine; ray: a cluster.")]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Local processes. Default: one per core.", show_default=False),
]
Address = Annotated[
    str | None, typer.Option(help="Ray: address of the cluster. Default: the one this machine belongs to.")
]
Part = Annotated[
    str | None,
    typer.Option(help="i/n: only every n-th shard from the i-th on, as in a job array.", metavar="i/n"),
]
PerShard = Annotated[
    int | None, typer.Option(min=1, help="Samples of a shard. Default: 1000.", show_default=False)
]
Megabytes = Annotated[
    int | None, typer.Option(min=1, help="Size of a shard instead, by the sizes of its files.")
]
Name = Annotated[str, typer.Option(help="Shards are called NAME-000000.tar, ...")]
Licence = Annotated[str, typer.Option(help="Of the data, for dataset.json.")]


def pack(
    inputs: Annotated[list[Path], typer.Argument(help="Folders of images, tables, saved data sets.")],
    out: Annotated[Path, typer.Argument(help="Folder for the shards; to go on, the same again.")],
    image_column: Annotated[str, typer.Option(help="Column with image paths or bytes.")] = "image",
    text_column: Annotated[str | None, typer.Option(help="Column with captions.")] = None,
    question_column: Annotated[str | None, typer.Option(help="Column with questions.")] = None,
    answer_column: Annotated[str | None, typer.Option(help="Column with an answer, or a list.")] = None,
    items_column: Annotated[
        str | None, typer.Option(help="Column with lists of {image: ...} and {text: ..., loss: ...}.")
    ] = None,
    image_root: Annotated[
        Path | None, typer.Option(help="Folder that image paths start from. Default: the table's.")
    ] = None,
    name: Name = "shard",
    samples_per_shard: PerShard = None,
    megabytes_per_shard: Megabytes = None,
    licence: Licence = "",
    executor: Where = "local",
    workers: Workers = None,
    address: Address = None,
    part: Part = None,
) -> None:
    """Make shards of your own images: folders, CSV, JSONL, Parquet, or Hugging Face datasets on disk.

    A folder holds images, each with a caption in a .txt (or .json) file of
    the same name. A table names its columns: images with captions become
    kind "pairs", with questions and answers "vqa", lists of items
    "interleaved". Pictures are copied byte for byte (JPEG, PNG, WebP).

    Rows that cannot be used are left out and counted. A run that was stopped
    goes on where it was; the same input gives the same bytes, however many
    processes work.
    """
    from flamingo.data.tools.pack import FolderLayout, TableLayout
    from flamingo.data.tools.tables import form_of

    with plain_errors():
        forms = {"folder" if form_of(path) == "folder" else "table" for path in inputs}
        if len(forms) > 1:
            raise ValueError("inputs are folders and tables: pack them one after the other")
        if forms == {"folder"}:
            if len(inputs) > 1:
                raise ValueError("one folder at a time: name the folder that holds them all")
            if image_column != "image" or any((text_column, question_column, answer_column, items_column)):
                raise ValueError("columns are of tables: a folder has its captions in .txt or .json files")
            layout: Layout = FolderLayout(str(image_root or inputs[0]))
        else:
            if image_root is None and len({path.absolute().parent for path in inputs}) > 1:
                raise ValueError("tables of several folders: name --image-root, the folder of the images")
            root = image_root or inputs[0].parent
            layout = TableLayout(
                str(root), image_column, text_column, question_column, answer_column, items_column
            )
        _make(
            inputs, out, layout, name, samples_per_shard, megabytes_per_shard, licence,
            executor_of(executor, workers, address, part),
        )  # fmt: skip


convert = typer.Typer(help="Published interleaved data sets -> shards.", no_args_is_help=True)
Images = Annotated[
    Path | None,
    typer.Option(help="Folder of pictures: by name, or by SHA-256 or MD5 of the address."),
]


@convert.command("mmc4")
def convert_mmc4(
    inputs: Annotated[list[Path], typer.Argument(help=".jsonl files, or zips of them, as published.")],
    out: Annotated[Path, typer.Argument(help="Folder for the shards; to go on, the same again.")],
    images: Images = None,
    name: Name = "mmc4",
    samples_per_shard: PerShard = None,
    megabytes_per_shard: Megabytes = None,
    executor: Where = "local",
    workers: Workers = None,
    address: Address = None,
    part: Part = None,
) -> None:
    """Multimodal C4: pages with text_list, image_info and similarity_matrix.

    Pictures come from the folder (image_name, or a digest of raw_url) or are
    base64 in the page. Those that are not there are taken out of their page;
    pages without any are left out, and counted.
    """
    from flamingo.data.tools.convert import Mmc4Layout

    with plain_errors():
        layout = Mmc4Layout(str(images) if images else None)
        run = executor_of(executor, workers, address, part)
        _make(inputs, out, layout, name, samples_per_shard, megabytes_per_shard, "ODC-BY", run)


@convert.command("obelics")
def convert_obelics(
    inputs: Annotated[list[Path], typer.Argument(help="Parquet or .jsonl files, or a saved data set.")],
    out: Annotated[Path, typer.Argument(help="Folder for the shards; to go on, the same again.")],
    images: Images = None,
    name: Name = "obelics",
    samples_per_shard: PerShard = None,
    megabytes_per_shard: Megabytes = None,
    executor: Where = "local",
    workers: Workers = None,
    address: Address = None,
    part: Part = None,
) -> None:
    """OBELICS: pages as parallel lists of texts and images.

    Pictures come from the folder (by a digest of their address) or are base64
    in the page. Those that are not there are taken out of their page; pages
    without any are left out, and counted.
    """
    from flamingo.data.tools.convert import ObelicsLayout

    with plain_errors():
        layout = ObelicsLayout(str(images) if images else None)
        run = executor_of(executor, workers, address, part)
        _make(inputs, out, layout, name, samples_per_shard, megabytes_per_shard, "CC-BY-4.0", run)


def index(
    shards: Shards,
    executor: Where = "local",
    workers: Workers = None,
    address: Address = None,
    part: Part = None,
) -> None:
    """Build the index of every shard and store it beside it, so that training starts at once.

    Training does it too where it has not been done. A shard that cannot be
    trusted is named; exit status 1.
    """
    from flamingo.data.tools.indexing import index as run

    with plain_errors():
        outcome = run(shards, executor_of(executor, workers, address, part))
        samples = sum(outcome.results.values())
        typer.echo(f"{len(outcome.results)} shards with {samples} samples are indexed")
        failed(outcome.failures)


def verify(
    shards: Shards,
    kind: Annotated[str | None, typer.Option(help="Decode every sample as this kind.")] = None,
    options: KindOptions = "{}",
    repair: Annotated[Path | None, typer.Option(help="Folder for clean copies of all shards.")] = None,
    report: Annotated[Path | None, typer.Option("--json", help="File for all faults.")] = None,
    max_sample_mb: Annotated[int, typer.Option(min=1, help="A larger sample is a fault.")] = 256,
    executor: Where = "local",
    workers: Workers = None,
    address: Address = None,
    part: Part = None,
) -> None:
    """Find every fault of shards, and name its shard, sample and byte; write clean copies.

    Reads all headers, also behind a damage; compares checksums where a
    dataset.json lies beside the shards; with --kind decodes every sample.
    Exit status 1 if there is any fault. Shards are never changed in place.
    """
    from flamingo.data.tools.verify import verify as run

    with plain_errors():
        run_on = executor_of(executor, workers, address, part)
        found = run(
            shards, kind, options_of(options), repair=repair, max_sample_mb=max_sample_mb, executor=run_on
        )
        if report:
            report.write_text(json.dumps({"faults": found.counts(), "shards": found.shards}, indent=1) + "\n")
        for shard, fault in found.faults[:SHOWN]:
            sample = f", sample {fault.key!r}" if fault.key is not None else ""
            typer.echo(f"{shard}{sample}, byte {fault.offset}: {fault.fault}: {fault.detail}")
        if len(found.faults) > SHOWN:
            typer.echo(f"... and {len(found.faults) - SHOWN} more: --json FILE lists all")
        good = sum(told["samples"] for told in found.shards.values())
        counted = ", ".join(f"{count} x {fault}" for fault, count in found.counts().items())
        depth = "" if kind else " (headers only: --kind decodes them too)"
        typer.echo(f"{len(found.shards)} shards, {good} good samples{depth}; faults: {counted or 'none'}")
        if repair:
            typer.echo(f"{repair}: clean copies, {good} samples")
        failed(found.outcome.failures)
        if found.faults:
            raise typer.Exit(1)


def stats(
    shards: Shards,
    out: Annotated[Path, typer.Option(help="Folder for stats.json and stats.png.")],
    kind: Kind = "pairs",
    options: KindOptions = "{}",
    tokenizer: Annotated[
        str | None, typer.Option(help="Name or folder; without one texts are counted in characters.")
    ] = None,
    executor: Where = "local",
    workers: Workers = None,
    address: Address = None,
) -> None:
    """Count samples, images and tokens; histograms of lengths and resolutions, as JSON and a picture."""
    from flamingo.data.tools.stats import stats as run
    from flamingo.data.tools.stats import write

    with plain_errors():
        found, outcome = run(
            shards, kind, options_of(options), tokenizer, executor_of(executor, workers, address, None)
        )
        places = write(found, out)
        typer.echo(
            f"{found['samples']} samples ({found['bad_samples']} bad), {found['images']} images, "
            f"{found['clips']} clips, {found['length']} {found['unit']}"
        )
        typer.echo("\n".join(map(str, places)))
        failed(outcome.failures)


def show(
    shards: Shards,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("documents.html"),
    kind: Kind = "pairs",
    options: KindOptions = "{}",
    documents: Annotated[int, typer.Option("--documents", "-n", min=1, help="How many.")] = 20,
    max_tokens: Annotated[int, typer.Option(min=2, help="As in the recipe: longer ones are cut.")] = 256,
    crop: Annotated[str, typer.Option(help="As in the recipe: start or random.")] = "start",
    p_next: Annotated[float, typer.Option(min=0, max=1, help="As in the recipe.")] = 0.0,
    tokenizer: Annotated[
        str | None, typer.Option(help="Name or folder, e.g. of a model; without one, bytes are tokens.")
    ] = None,
    side: Annotated[int, typer.Option(min=8, help="Pixels of the encoder's pictures.")] = 224,
    seed: Annotated[int, typer.Option(help="As in the recipe: the order.")] = 0,
) -> None:
    """Write a page with the first documents of the training order, as the model will see them.

    Text, images, which image each word sees, what is learned, what is cut.
    """
    from pydantic import ValidationError

    from flamingo.data.config import SourceConfig
    from flamingo.data.tools.show import show as run

    with plain_errors():
        fields = {"kind": kind, "options": options_of(options), "shards": shards, "max_tokens": max_tokens}
        try:
            source = SourceConfig.model_validate(
                {"name": "shards", "batch": 1, **fields, "crop": crop, "p_next": p_next}
            )
        except ValidationError as error:
            first = error.errors()[0]
            what = first["msg"].removeprefix("Value error, ")
            raise ValueError(f"--{first['loc'][0]} {first['input']}: {what}") from None
        tokens = run(source, out, documents=documents, seed=seed, tokenizer=tokenizer, side=side)
        typer.echo(f"{out}: {documents} documents, {tokens} tokens")


@contextmanager
def plain_errors() -> Iterator[None]:
    """The user's mistakes in one line, exit status 1."""
    from flamingo.data.errors import TooManyBadSamples

    try:
        yield
    except (ValueError, OSError, TooManyBadSamples) as error:
        stop(str(error))


def stop(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)


def executor_of(name: str, workers: int | None, address: str | None, part: str | None) -> Executor:
    from flamingo.data.tools.executors import Executor

    return Executor(name, workers, address, part)


def options_of(text: str) -> dict[str, Any]:
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--options {text}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"--options {text}: write names and values, as in '{{min_side: 64}}'")
    return value


def _make(
    inputs: list[Path],
    out: Path,
    layout: Layout,
    name: str,
    samples: int | None,
    megabytes: int | None,
    licence: str,
    executor: Executor,
) -> None:
    from flamingo.data.tools.planning import make_shards

    if samples is None and megabytes is None:
        samples = 1000
    made = make_shards(
        inputs,
        out,
        layout,
        name=name,
        samples=samples,
        megabytes=megabytes,
        executor=executor,
        licence=licence,
    )
    _say(made, out, name, layout)
    failed(made.outcome.failures)


def _say(made: Made, out: Path, name: str, layout: Layout) -> None:
    written = sum(told["samples"] for told in made.outcome.results.values())
    typer.echo(f"{out}: {written} samples in {len(made.outcome.results)} shards of kind {layout.kind}")
    if made.left_out:
        counted = ", ".join(f"{count} x {fault}" for fault, count in made.left_out.items())
        typer.echo(f"left out: {counted}. The first:")
        typer.echo("\n".join(f"  {line}" for line in made.examples[:SHOWN]))
    if made.card is None and not made.outcome.failures:
        typer.echo("other parts are not there yet: the last one writes dataset.json")
    elif made.card:
        pattern = shlex.quote(f"{out}/{name}-*.tar")
        typer.echo(f"in a recipe:  kind: {layout.kind}, shards: {pattern}")


def failed(failures: dict[str, str]) -> None:
    for shard, error in failures.items():
        typer.echo(f"error: {shard}: {error}", err=True)
    if failures:
        raise typer.Exit(1)


COMMANDS = {"pack": pack, "index": index, "verify": verify, "stats": stats, "show": show}

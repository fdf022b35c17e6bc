"""`flamingo convert ...`: the command line of this room. Imports what is heavy only when it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Model folders from the weights of other systems.", no_args_is_help=True)

Out = Annotated[Path, typer.Option(help="Folder for the model; new, or empty.", show_default=False)]


@app.callback()
def _group() -> None:
    """Model folders from the weights of other systems."""


@app.command()
def openflamingo(
    checkpoint: Annotated[Path, typer.Argument(help="checkpoint.pt, released or of a training run.")],
    language: Annotated[
        str, typer.Option(help="The frozen language model that it was trained with: name or folder.")
    ],
    every: Annotated[int, typer.Option(min=1, help="Its cross_attn_every_n_layers.")],
    out: Out,
    vision: Annotated[
        str, typer.Option(help="The frozen encoder that it was trained with, as source:name.")
    ] = "open_clip:ViT-L-14/openai",
) -> None:
    """Convert a checkpoint of OpenFlamingo."""
    with _plain_errors():
        from flamingo.checkpoints.openflamingo import convert

        for note in convert(checkpoint, vision, language, every, out):
            typer.echo(f"note: {note}")
        typer.echo(f"{out}")


@app.command()
def idefics(
    folder: Annotated[Path, typer.Argument(help="Folder with config.json, *.safetensors and a tokenizer.")],
    out: Out,
) -> None:
    """Convert an Idefics (version 1) of transformers."""
    with _plain_errors():
        from flamingo.checkpoints.idefics import convert

        for note in convert(folder, out):
            typer.echo(f"note: {note}")
        typer.echo(f"{out}")


@app.command()
def llava(
    folder: Annotated[Path, typer.Argument(help="Folder with config.json, *.safetensors and a tokenizer.")],
    out: Out,
) -> None:
    """Convert a LLaVA-1.5 of transformers: an MLP connector, its vectors in the LM's input."""
    with _plain_errors():
        from flamingo.checkpoints.llava import convert

        for note in convert(folder, out):
            typer.echo(f"note: {note}")
        typer.echo(f"{out}")


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """The user's mistakes in one line, exit status 1."""
    from flamingo.runtime import quiet_libraries

    quiet_libraries()
    try:
        yield
    except (ValueError, OSError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from None

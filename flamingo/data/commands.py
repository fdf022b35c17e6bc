"""`flamingo data ...`: the command line of this room. Imports what is heavy only when it runs."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from flamingo.data.tools import commands as tools

app = typer.Typer(help="Make, check and look at training data.", no_args_is_help=True)
app.add_typer(tools.convert, name="convert")
for name, command in tools.COMMANDS.items():
    app.command(name)(command)


@app.command("easy-vqa")
def easy_vqa(
    out: Annotated[Path, typer.Argument(help="Folder for the shards; new, or empty.")],
    turns: Annotated[
        int,
        typer.Option(min=1, help="Pictures, each with a question and its answer, per document."),
    ] = 5,
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Pairs or documents per tar file.")] = 1000,
    balance: Annotated[
        int,
        typer.Option(min=0, help="Questions of each kind and yes/no answer; 0: every question once."),
    ] = 0,
    seed: Annotated[int, typer.Option(help="Decides which questions share a document.")] = 0,
) -> None:
    """Write the training split of easy-VQA as WebDataset shards.

    easy-VQA is a small published data set: 5,000 pictures of coloured shapes
    and 48,248 questions about them. It comes with the package easy-vqa (MIT
    licence), so nothing is downloaded.

    Written are pairs-*.tar (a picture and its caption), documents-*.tar
    (several pictures, each with a question and its answer, in a row) and
    dataset.json (settings and counts). The test split is never written.
    """
    from flamingo.data.easy_vqa import write_shards

    try:
        card = write_shards(
            out, turns=turns, per_shard=samples_per_shard, seed=seed, balance=balance or None, track=_track
        )
    except ValueError as error:
        tools.stop(str(error))
    except OSError as error:
        tools.stop(f"cannot write {out}: {error.strerror or error}")
    counts = card.counts
    typer.echo(
        f"{out}: {counts['pairs']} caption pairs, {counts['documents']} documents "
        f"({counts['questions']} questions) in {len(card.files)} shards; {card.licence}"
    )


def _track(items: Iterable[Any], what: str, total: int) -> Iterable[Any]:
    """A progress bar on a terminal, nothing in a pipe."""
    if not sys.stderr.isatty():
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, what, total, console=Console(stderr=True))

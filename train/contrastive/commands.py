"""`flamingo clip train`: options, and the start of the ranks."""

from __future__ import annotations

from typing import Annotated

import typer

from flamingo.data.tools.commands import plain_errors


def train(
    recipe: Annotated[str, typer.Argument(help="YAML recipe; see train/contrastive/recipes.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, e.g. steps=100 data.shards='pairs-*.tar'.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's newest checkpoint.")] = False,
    processes: Annotated[
        int | None,
        typer.Option(
            min=1, help="Processes side by side. Default: one per GPU; on a CPU, two.", show_default=False
        ),
    ] = None,
    accept_changed_shards: Annotated[
        bool, typer.Option(help="Resume although shards were added, altered or removed.")
    ] = False,
) -> None:
    """Train a dual encoder of open_clip on shards of pictures with captions.

    Either a new small one, whose sizes stand in the recipe, or one of open_clip's, with or without
    its weights. RUN/model is then a folder that open_clip loads as local-dir:RUN/model, and that
    takes the place of any encoder here as open_clip:RUN/model.
    """
    from flamingo.train.contrastive.config import read_recipe
    from flamingo.train.launch import start

    with plain_errors():
        read_recipe(recipe, overrides)  # here, where its errors are short
        words = [recipe, *(overrides or []), *(["--resume"] if resume else [])]
        words += ["--accept-changed-shards"] if accept_changed_shards else []
        raise typer.Exit(start("flamingo.train.contrastive", words, processes))

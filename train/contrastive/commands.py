"""`flamingo clip train`: options, and the start of the ranks."""

from __future__ import annotations

from typing import Annotated

import typer

from flamingo.data.tools.commands import plain_errors
from flamingo.train.options import AcceptChangedShards, Processes, Resume


def train(
    recipe: Annotated[str, typer.Argument(help="YAML recipe; see train/contrastive/recipes.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, e.g. steps=100 data.shards='pairs-*.tar'.")
    ] = None,
    resume: Resume = False,
    processes: Processes = None,
    accept_changed_shards: AcceptChangedShards = False,
) -> None:
    """Train a dual encoder of open_clip on shards of pictures with captions.

    Either a new small one, whose sizes stand in the recipe, or one of open_clip's, with or without
    its weights. RUN/model is then a folder that open_clip loads as local-dir:RUN/model, and that
    takes the place of any encoder here as open_clip:RUN/model.
    """
    from flamingo.train.contrastive.config import read_recipe
    from flamingo.train.launch import launch

    with plain_errors():
        module = "flamingo.train.contrastive"
        given = overrides or []
        status = launch(recipe, given, resume, processes, accept_changed_shards, module, read_recipe)
        raise typer.Exit(status)

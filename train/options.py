"""Options of the commands that train."""

from __future__ import annotations

from typing import Annotated

import typer

Resume = Annotated[bool, typer.Option("--resume", help="Go on from the run's newest checkpoint.")]
Processes = Annotated[
    int | None,
    typer.Option(
        min=1, help="Processes side by side. Default: one per GPU; on a CPU, two.", show_default=False
    ),
]
AcceptChangedShards = Annotated[
    bool, typer.Option(help="Resume although shards were added, altered or removed.")
]

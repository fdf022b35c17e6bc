"""`flamingo demo`: the page of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flamingo.data.tools.commands import plain_errors


def demo(
    model: Annotated[Path, typer.Argument(help="Model folder, e.g. runs/quickstart/model.")],
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0: whoever reaches this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 7860,
    queue: Annotated[int, typer.Option(min=1, help="Questions that may wait; more are turned away.")] = 64,
    root_path: Annotated[str, typer.Option(help="Behind a proxy: the path or address of the page.")] = "",
    max_pictures: Annotated[int, typer.Option(min=1, max=32, help="Of a prompt.")] = 6,
    max_megabytes: Annotated[int, typer.Option(min=1, help="Of an uploaded picture.")] = 20,
    max_megapixels: Annotated[int, typer.Option(min=1, help="Of an uploaded picture.")] = 40,
    max_characters: Annotated[int, typer.Option(min=1, help="Of a prompt's text.")] = 4000,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer one can ask for.")] = 256,
) -> None:
    """Ask a model on a web page: pictures and text, examples first if you like, and where it looked.

    Needs the extra `demo`. One question is answered at a time; the others wait and see their place.
    """
    from flamingo.runtime import quiet_libraries

    quiet_libraries()
    with plain_errors():
        from flamingo.serving.demo.limits import Limits
        from flamingo.serving.demo.server import Place
        from flamingo.serving.demo.start import serve

        limits = Limits(max_pictures, max_megabytes, max_megapixels, max_characters, max_new_tokens)
        serve(model, Place(host, port, root_path), limits, queue, typer.echo)

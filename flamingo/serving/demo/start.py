"""A model folder -> a page that is served. What may fail soon fails before the model is loaded."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from flamingo.folders import check_model
from flamingo.serving.demo.limits import Limits
from flamingo.serving.demo.server import Place


def serve(folder: Path, place: Place, limits: Limits, queue: int, say: Callable[[str], None]) -> None:
    """Until it is interrupted. Raises ValueError for a folder without a model of ours, a place that
    cannot be had, or without Gradio."""
    check_model(folder)
    if find_spec("gradio") is None:
        raise ValueError("the page needs gradio: pip install 'flamingo-vlm[demo]'")
    place.check()
    say(f"loading {folder} ...")
    from flamingo.serving.demo.asking import Asking
    from flamingo.serving.engine import Engine

    asking = Asking(Engine(folder), limits)
    # A folder of its own, which goes with the server; other pages of this machine have another.
    with tempfile.TemporaryDirectory(prefix="flamingo-demo-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        from flamingo.serving.demo import page

        built = page.build(asking, folder.resolve().name, queue)
        url = page.launch(built, place, limits, wait=False)
        say(f"the page is at {url} (Ctrl+C ends it)")
        built.block_thread()

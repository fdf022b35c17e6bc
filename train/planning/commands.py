"""`flamingo plan`: what its arguments mean, and what it prints."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence

from flamingo.runtime import logs_from
from flamingo.train.config import read_recipe
from flamingo.train.plan import plan
from flamingo.train.planning.show import show


def run(
    recipe: str,
    overrides: list[str],
    gpus: int,
    gpu_memory: float,
    utilisation: float,
    peak: float | None,
    images: Sequence[str],
    as_json: bool,
) -> None:
    """Plan and print. Raises ValueError as `plan` and `read_recipe`."""
    # Libraries warn of weights that a plan does not want, and of each of their attempts without a network.
    with logs_from(logging.ERROR, ""), logs_from(logging.CRITICAL, "huggingface_hub"):
        made = plan(
            read_recipe(recipe, overrides),
            gpus=gpus,
            gpu_memory=gpu_memory,
            utilisation=utilisation,
            peak=peak,
            images=dict(map(_images, images)),
        )
    if as_json:
        print(json.dumps(made.as_json(), indent=1))
    else:
        show(made)


def _images(text: str) -> tuple[str, int]:
    name, equals, number = text.partition("=")
    if not equals or not number.isdecimal():
        raise ValueError(f"--images {text!r}: write SOURCE=N, e.g. --images documents=5")
    return name, int(number)

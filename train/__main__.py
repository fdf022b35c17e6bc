"""One rank of a training run: `deepspeed --module flamingo.train RECIPE.yaml key=value ...`.

`flamingo train` starts the launcher for you; torchrun and srun work as well.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from flamingo.train import rank

if TYPE_CHECKING:
    from flamingo.train.stopping import Stopping


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    return rank.parser("flamingo.train", "a Flamingo").parse_args(arguments)


def act(arguments: argparse.Namespace, resume: bool, stopping: Stopping) -> None:
    from flamingo.train.config import read_recipe
    from flamingo.train.session import train

    recipe = read_recipe(arguments.recipe, arguments.overrides)
    evaluate = None
    if recipe.evaluate:
        from flamingo.eval.hook import Hook

        evaluate = Hook(recipe.evaluate.settings)
    train(recipe, resume, arguments.accept_changed_shards, stopping, evaluate)


def main() -> int:
    return rank.run(parse(), act)


if __name__ == "__main__":
    sys.exit(main())

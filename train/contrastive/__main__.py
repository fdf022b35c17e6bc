"""One rank of a dual encoder's training: `torchrun -m flamingo.train.contrastive RECIPE.yaml ...`.

`flamingo clip train` starts the launcher for you; deepspeed and srun work as well.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from flamingo.train import rank

if TYPE_CHECKING:
    from flamingo.train.stopping import Stopping


def act(arguments: argparse.Namespace, resume: bool, stopping: Stopping) -> None:
    from flamingo.train.contrastive.config import read_recipe
    from flamingo.train.contrastive.session import train

    recipe = read_recipe(arguments.recipe, arguments.overrides)
    train(recipe, resume, arguments.accept_changed_shards, stopping)


def main() -> int:
    return rank.run(rank.parser("flamingo.train.contrastive", "a dual encoder").parse_args(), act)


if __name__ == "__main__":
    sys.exit(main())

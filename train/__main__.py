"""One rank of a training run: `deepspeed --module flamingo.train RECIPE.yaml key=value ...`.

`flamingo train` starts the launcher for you; torchrun and srun work as well.
"""

from __future__ import annotations

import argparse
import os
import sys

from flamingo.runtime import quiet_libraries


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="flamingo.train", description="Train a Flamingo as a recipe says, as one rank of a launcher."
    )
    parser.add_argument("recipe", help="YAML file; see train/recipes")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. steps=100 optimizer.lr=1e-4")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the run")
    parser.add_argument(
        "--accept-changed-shards", action="store_true", help="resume although shards were added or altered"
    )
    parser.add_argument("--local_rank", type=int, default=None, help="set by the deepspeed launcher")
    return parser.parse_args(arguments)


def main() -> int:
    arguments = parse()
    quiet_libraries()
    from flamingo.data.errors import TooManyBadSamples
    from flamingo.train import group
    from flamingo.train.config import read_recipe
    from flamingo.train.session import SharedError, train
    from flamingo.train.stopping import Stopped, Stopping, status

    rank = 0
    stopping = Stopping()  # now: loading takes long, and whoever asks then shall be heard
    try:
        found = group.member(os.environ, arguments.local_rank)
        rank = found.rank
        group.announce(found, os.environ)
        recipe = read_recipe(arguments.recipe, arguments.overrides)
        evaluate = None
        if recipe.evaluate:
            from flamingo.eval.hook import Hook

            evaluate = Hook(recipe.evaluate.settings)
        resume = arguments.resume or group.restarted(os.environ)
        train(recipe, resume, arguments.accept_changed_shards, stopping, evaluate)
    except Stopped as why:
        if rank == 0:
            print(why, file=sys.stderr, flush=True)
        return status()
    except (ValueError, OSError, TooManyBadSamples) as error:
        if rank == 0 or not isinstance(error, SharedError):
            print(f"error (rank {rank}): {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

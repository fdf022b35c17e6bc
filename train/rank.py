"""What each rank of a launcher does around its training: arguments, signals, and how it ends."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from flamingo.runtime import quiet_libraries

if TYPE_CHECKING:
    from flamingo.train.stopping import Stopping

Act = Callable[[argparse.Namespace, bool, "Stopping"], None]  # arguments, whether to go on, who listens


def parser(module: str, trains: str) -> argparse.ArgumentParser:
    """module: that a launcher starts; trains: what its recipes train, in a word or two."""
    made = argparse.ArgumentParser(
        prog=module, description=f"Train {trains} as a recipe says, as one rank of a launcher."
    )
    made.add_argument("recipe", help="YAML file; see train/recipes")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. steps=100 optimizer.lr=1e-4")
    made.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the run")
    made.add_argument(
        "--accept-changed-shards", action="store_true", help="resume although shards were added or altered"
    )
    made.add_argument("--local_rank", type=int, default=None, help="set by the deepspeed launcher")
    return made


def run(arguments: argparse.Namespace, act: Act) -> int:
    """Train; the exit status. What is wrong is said in one line, by the one rank that has to."""
    quiet_libraries()
    from flamingo.data.errors import TooManyBadSamples
    from flamingo.train import group
    from flamingo.train.stopping import Stopped, Stopping, status

    rank = 0
    stopping = Stopping()  # now: loading takes long, and whoever asks then shall be heard
    try:
        found = group.member(os.environ, arguments.local_rank)
        rank = found.rank
        group.announce(found, os.environ)
        act(arguments, arguments.resume or group.restarted(os.environ), stopping)
    except Stopped as why:
        if rank == 0:
            print(why, file=sys.stderr, flush=True)
        return status()
    except (ValueError, OSError, TooManyBadSamples) as error:
        if rank == 0 or not isinstance(error, group.SharedError):
            print(f"error (rank {rank}): {error}", file=sys.stderr, flush=True)
        return 1
    except RuntimeError as error:
        if not _lost(error):
            raise
        told = " ".join(str(error).split("\nException raised from")[0].split())  # without torch's own stack
        print(
            f"error (rank {rank}): lost another rank, which has ended or cannot be reached (what it said "
            f"tells why): {told}",
            file=sys.stderr,
            flush=True,
        )
        return 1
    return 0


def _lost(error: RuntimeError) -> bool:
    """Whether a collective failed for what became of another rank; gloo has no class for it."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or "gloo/transport" in str(error)

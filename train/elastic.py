"""torchrun whose exit status says what happened: `python -m flamingo.train.elastic OPTIONS -m MODULE ...`.

Torchrun itself ends with 1 whatever ended its ranks. Here 70 means that a rank hung and 128 + N that
signal N killed one, as from the ranks themselves (docs/cluster.md), so a queue can tell a lost node
from a wrong setting. Options are torchrun's.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

GRACE = 25  # seconds: 30 after the first failure, torchrun kills the ranks that do not heed its SIGTERM


def status_of(exit_code: int) -> int:
    """Of a process as a shell tells it, from what Python says: -9 is 137."""
    return 128 - exit_code if exit_code < 0 else exit_code


def cause(failures: Sequence[ProcessFailure]) -> int:
    """The highest status of ranks that ended by themselves.

    Once one has failed, torchrun ends the others, which says nothing of what happened.
    """
    first = min(failure.timestamp for failure in failures)
    own = [f for f in failures if f.timestamp - first < GRACE and f.exitcode != -signal.SIGTERM]
    return max(status_of(failure.exitcode) for failure in own or failures)


def main(words: list[str] | None = None) -> int:
    try:
        run.main(words)
    except ChildFailedError as error:
        print(error, file=sys.stderr, flush=True)
        return cause(list(error.failures.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

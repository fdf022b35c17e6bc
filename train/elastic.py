"""torchrun whose exit status says what happened: `python -m flamingo.train.elastic OPTIONS -m MODULE ...`.

Torchrun itself ends with 1 whatever ended its ranks. Here 70 means that a rank hung and 128 + N that
signal N killed one, as from the ranks themselves (docs/cluster.md), so a queue can tell a lost node
from a wrong setting. Options are torchrun's.
"""

from __future__ import annotations

import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def status_of(exit_code: int) -> int:
    """Of a process as a shell tells it, from what Python says: -9 is 137."""
    return 128 - exit_code if exit_code < 0 else exit_code


def main(words: list[str] | None = None) -> int:
    try:
        run.main(words)
    except ChildFailedError as error:
        print(error, file=sys.stderr, flush=True)
        return max(status_of(failure.exitcode) for failure in error.failures.values())
    return 0


if __name__ == "__main__":
    sys.exit(main())

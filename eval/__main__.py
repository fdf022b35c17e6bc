"""`flamingo eval run` as a module, for launchers: `torchrun -m flamingo.eval MODEL --benchmark NAME`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from flamingo.eval.session import SHARE, work
from flamingo.processes import end_with_parent, member
from flamingo.runtime import quiet_libraries


def main() -> None:
    quiet_libraries()
    if SHARE in os.environ:  # one of the processes that `flamingo eval run` starts
        end_with_parent()
        try:
            work(Path(os.environ[SHARE]), *member())
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")
        return
    import typer

    from flamingo.eval.commands import run

    # DeepSpeed's launcher adds this; the rank is in the environment too.
    sys.argv[1:] = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    typer.run(run)


if __name__ == "__main__":
    main()

"""`flamingo generate` as a module, for launchers: `torchrun -m flamingo.serving --model MODEL ...`."""

from __future__ import annotations

import os
import sys

from flamingo.runtime import quiet_libraries


def main() -> None:
    quiet_libraries()
    from flamingo.serving.job import SHARE, share

    if SHARE in os.environ:  # one of the processes that `flamingo generate` starts
        try:
            share(os.environ[SHARE])
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")
        except KeyboardInterrupt:
            sys.exit(130)
        return
    import typer

    from flamingo.serving.commands import generate

    # DeepSpeed's launcher adds this; the rank is in the environment too.
    sys.argv[1:] = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    typer.run(generate)


if __name__ == "__main__":
    main()

"""One process of an evaluation: `python -m flamingo.eval`, started by `flamingo eval`."""

from __future__ import annotations

import os
import sys

from flamingo.eval.session import main

if __name__ == "__main__":
    sys.exit(main(rank=int(os.environ.get("RANK", "0")), world=int(os.environ.get("WORLD_SIZE", "1"))))

"""Do the packages of this environment fit each other? `pip check`, but for what is overridden on purpose.

    python check.py docker/locks/overrides.txt

Prints what does not fit and exits with 1 where there is something.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def overridden(text: str) -> set[str]:
    """The names of a requirements file."""
    return {name.lower() for name in re.findall(r"(?m)^([A-Za-z0-9._-]+)", text)}


def broken(said: str, allowed: set[str]) -> list[str]:
    """The lines of `pip check` that no override explains."""
    wanting = re.compile(r"\S+ \S+ has requirement ([A-Za-z0-9._-]+).*, but you have ")
    found = []
    for line in said.splitlines():
        match = wanting.match(line)
        if not match or match[1].lower() not in allowed:
            found.append(line)
    return found


def main() -> int:
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    if done.returncode == 0:
        return 0
    told = broken(done.stdout, overridden(Path(sys.argv[1]).read_text())) + done.stderr.splitlines()
    if not done.stdout.strip():
        told.append("pip check failed without a word")
    print("\n".join(told), file=sys.stderr)
    return 1 if told else 0


if __name__ == "__main__":
    sys.exit(main())

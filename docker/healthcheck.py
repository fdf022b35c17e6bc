"""Is the container well? Of a demo: its page answers. Of anything else: its process is there.

Exit status 0 or 1, with a line that says why. The page is that of FLAMINGO_HEALTH_URL, if it is set.
"""

from __future__ import annotations

import http.client
import os
import sys
import urllib.request
from pathlib import Path

DEFAULT = "http://127.0.0.1:7860/"
SECONDS = 4


def is_demo(command: Path = Path("/proc/1/cmdline")) -> bool:
    """Whether the container's first process is `flamingo demo`."""
    try:
        words = command.read_bytes().split(b"\0")
    except OSError:
        return False
    return b"demo" in words[1:4]


def port_of(command: Path = Path("/proc/1/cmdline")) -> str:
    """The page's address, with the port that the demo was given."""
    words = command.read_bytes().decode(errors="replace").split("\0")
    for word, following in zip(words, [*words[1:], ""]):
        port = following if word == "--port" else word.partition("=")[2] if word.startswith("--port=") else ""
        if port.isdigit():
            return f"http://127.0.0.1:{port}/"
    return DEFAULT


def main() -> int:
    url = os.environ.get("FLAMINGO_HEALTH_URL")
    if url is None:
        if not is_demo():
            print("no demo: nothing to ask, the process is there")
            return 0
        url = port_of()
    # The page is in this container: a proxy of the environment would look for it elsewhere.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=SECONDS) as answer:
            print(f"{url}: {answer.status}")
            return 0
    except (OSError, ValueError, http.client.HTTPException) as error:
        print(f"{url}: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())

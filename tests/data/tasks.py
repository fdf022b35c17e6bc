"""A task for processes of their own: here, so that they need not import what tests do."""

from __future__ import annotations

import os


def die_or_say(argument: tuple[str, str]) -> str:
    """(file, word) -> word; "die" ends the process, "once" does where the file is not there yet."""
    mark, word = argument
    if word == "die":
        os._exit(9)
    if word == "once" and not os.path.exists(mark):
        open(mark, "w").close()
        os._exit(9)
    return word

"""Names that users write, held against those that are known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def hint(name: str, known: Iterable[str]) -> str:
    """What an error adds about a name that is not known: the nearest one, or those that it is a part of
    (`width` of `resampler_width`), else all, in their order."""
    known = list(known)

    def alike(least: float) -> list[str]:
        return difflib.get_close_matches(name, known, n=1, cutoff=least)

    near = alike(0.8) or [one for one in known if len(name) > 2 and name in one] or alike(0.6)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    return f"known: {', '.join(known)}"

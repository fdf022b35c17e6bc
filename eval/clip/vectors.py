"""Entries -> vectors, where some pictures may not be readable.

N entries, D width of a vector.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flamingo.eval.clip.sources import Entry, Found
from flamingo.eval.embedding import Encoder, Item, Part
from flamingo.eval.vectors import Vectors

NAMED = 3  # pictures that an error names


@dataclass
class Embedded:
    """entries: those that can be read; keys: of their contents, each once, in the order of the entries;
    vectors: float32[K, D] of the keys; bad: why the others cannot be read, by where they lie."""

    entries: list[Entry]
    keys: list[str]
    vectors: np.ndarray
    bad: dict[str, str]

    def of_entries(self) -> np.ndarray:
        """float32[N, D], one of each entry."""
        at = {key: row for row, key in enumerate(self.keys)}
        return self.vectors[[at[entry.key] for entry in self.entries]]


def embedded(found: Found, encoder: Encoder, part: Part, store: Vectors, max_bad: float) -> Embedded:
    """Of what can be read. Raises ValueError where nothing can, or more than a share `max_bad` cannot."""
    items: dict[str, Item] = {}
    for entry in found.entries:
        items.setdefault(entry.key, entry.item)
    left_out: dict[str, str] = {}
    vectors = store.get(encoder, part, items, left_out=left_out)
    entries = [entry for entry in found.entries if entry.key not in left_out]
    bad = found.bad | {e.where: left_out[e.key] for e in found.entries if e.key in left_out}
    _check_share(len(entries), bad, max_bad)
    return Embedded(entries, [key for key in items if key not in left_out], vectors, bad)


def _check_share(good: int, bad: dict[str, str], most: float) -> None:
    total = good + len(bad)
    if good and len(bad) <= most * total:
        return
    told = "; ".join(f"{where}: {why}" for where, why in list(bad.items())[:NAMED])
    rule = f"more than --max-bad {most:g} of them" if good else "nothing is left"
    raise ValueError(f"{len(bad):,} of {total:,} cannot be read, {rule}; the first: {told}")

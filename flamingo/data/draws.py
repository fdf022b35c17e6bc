"""Random numbers as pure functions of a key: the same on every machine and for ever."""

from __future__ import annotations

import hashlib

Key = int | str


def draw(*key: Key) -> int:
    """A key -> a uniform 64-bit number."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def uniform(low: float, high: float, *key: Key) -> float:
    """A key -> a uniform number in [low, high)."""
    return low + (high - low) * (draw(*key) / 2**64)

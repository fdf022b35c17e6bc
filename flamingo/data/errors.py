"""What may go wrong with data, told apart: a sample to skip, a shard to repair, a run to stop."""

from __future__ import annotations

from os import PathLike
from typing import NamedTuple


class BadSample(ValueError):
    """One sample cannot be used; the stream replaces it and goes on.

    `fault` is a short constant phrase to count by ("damaged image"), `detail` is this case.
    """

    def __init__(self, fault: str, detail: str) -> None:
        super().__init__(fault, detail)  # both in args, so that it pickles out of a worker
        self.fault = fault
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.fault}: {self.detail}"


class Skipped(NamedTuple):
    """A bad sample that another one replaced."""

    key: str
    fault: str
    detail: str


class ShardError(ValueError):
    """A shard as a whole cannot be trusted: truncated, damaged, ambiguous or altered."""

    def __init__(self, path: str | PathLike[str], what: str, key: str | None = None, offset: int = 0) -> None:
        super().__init__(path, what, key, offset)
        self.path, self.what, self.key, self.offset = path, what, key, offset

    def __str__(self) -> str:
        near = "" if self.key is None else f", sample {self.key!r}"
        return f"{self.path}{near}, byte {self.offset}: {self.what}"


class TooManyBadSamples(RuntimeError):
    """So many samples in a row are bad that replacing them would hide a broken data set."""

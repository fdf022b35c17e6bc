"""A folder of weights, complete or absent, that reads as it was written."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` that takes its name if the block ends well; one that is there goes."""
    part, old = out.with_name(f".{out.name}.part"), out.with_name(f".{out.name}.old")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    part.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def compare(folder: Path, written: Mapping[str, Tensor], read: Mapping[str, Tensor]) -> None:
    """Raises OSError where a tensor is not what was written."""
    for name, value in written.items():
        if name not in read or not torch.equal(read[name], value):
            raise OSError(f"{folder}: {name} reads otherwise than it was written; is the disk sound?")

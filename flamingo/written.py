"""Weights on disk: complete or absent, as readable as other files, and as they were written."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from flamingo.data.writing import fsync_folder

MARKS = ("config.json", "open_clip_config.json")  # one of them lies in every folder of a model


def share(path: Path) -> None:
    """Give a file the rights of any new file in its folder: safetensors keeps all but its owner out."""
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    new.touch()
    try:
        shutil.copymode(new, path)
    finally:
        new.unlink()


def check_place(out: Path) -> None:
    """Raises ValueError for a place where something other than a model would be lost."""
    if not out.exists() or (out.is_dir() and any((out / mark).is_file() for mark in MARKS)):
        return
    if not out.is_dir():
        raise ValueError(f"{out} is a file: name a folder for the model")
    if any(out.iterdir()):
        raise ValueError(
            f"{out} holds something other than a model (no {' or '.join(MARKS)}), which would be lost: "
            "name a folder that is new or empty, or that of a model to replace"
        )


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` that takes its name if the block ends well; a model that is there goes.

    Raises ValueError where `out` holds something else.
    """
    check_place(out)
    out = out.absolute()  # "." has no name
    part, old = out.with_name(f".{out.name}.part"), out.with_name(f".{out.name}.old")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    for path in list(part.rglob("*")):
        if path.is_file():
            if path.suffix == ".safetensors":
                share(path)
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    part.rename(out)
    fsync_folder(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def compare(folder: Path, written: Mapping[str, Tensor], read: Mapping[str, Tensor]) -> None:
    """Raises OSError where a tensor is not what was written."""
    for name, value in written.items():
        if name not in read or not torch.equal(read[name], value):
            raise OSError(f"{folder}: {name} reads otherwise than it was written; is the disk sound?")

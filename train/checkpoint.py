"""Checkpoints are complete or absent.

A checkpoint is a folder `step-000123` with what DeepSpeed wrote (trained weights, optimizer)
and `manifest.json` (SHA-256 of every file, the step, the run's identity). It is written beside
its place under another name and renamed when all of it is on disk. DeepSpeed's loader
unpickles, so nothing is opened whose manifest does not match.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

MANIFEST, TAG = "manifest.json", "state"


def save(engine: Any, folder: Path, step: int, identity: dict, keep: int = 2) -> Path:
    """Write `folder/step-...`, called by all ranks; keeps the newest `keep`. Returns its path."""
    target = folder / f"step-{step:06d}"
    part = folder / f".{target.name}.part"
    if dist.get_rank() == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    dist.barrier()
    try:
        engine.save_checkpoint(
            str(part), tag=TAG, client_state={"step": step}, save_latest=False, exclude_frozen_parameters=True
        )
    except (RuntimeError, OSError) as error:  # torch.save reports a full disk as RuntimeError
        free = shutil.disk_usage(folder).free >> 20
        raise OSError(
            f"checkpoint {target} cannot be written ({free} MB are free there): {error}. "
            "The checkpoint before it is intact; make room and go on with --resume"
        ) from None
    dist.barrier()
    if dist.get_rank() == 0:
        _complete(part, target, step, identity)
        for old in complete(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return target


def _complete(part: Path, target: Path, step: int, identity: dict) -> None:
    files = {str(p.relative_to(part)): _sha256(p) for p in sorted(part.rglob("*")) if p.is_file()}
    manifest = {"step": step, "identity": identity, "files": files}
    (part / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in [*part.rglob("*"), part]:
        _sync(path)
    shutil.rmtree(target, ignore_errors=True)  # the same step of an earlier, damaged attempt
    part.rename(target)
    _sync(target.parent)


def complete(folder: Path) -> list[Path]:
    """Folders that were renamed into place, oldest first."""
    return sorted(folder.glob("step-*"), key=lambda path: int(path.name.partition("-")[2]))


def newest(folder: Path, identity: dict, warn: Any = print) -> Path | None:
    """The newest undamaged checkpoint; a damaged one is named and the one before it taken.

    Raises ValueError when it belongs to a run with other settings, or when all are damaged.
    """
    found = complete(folder)
    for path in reversed(found):
        damaged = damage(path)
        if damaged:
            warn(f"{path}: {damaged}; trying the checkpoint before it")
            continue
        manifest = json.loads((path / MANIFEST).read_text())
        changed = differences(manifest["identity"], identity)
        if changed:
            raise ValueError(
                f"{path} is from other settings ({'; '.join(changed)}): "
                "set them back, or choose another folder with run=FOLDER"
            )
        return path
    if found:
        raise ValueError(f"{folder}: all {len(found)} checkpoints are damaged; start again with run=FOLDER")
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, None when every file is as its manifest says."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files, _ = dict(manifest["files"]), manifest["identity"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({error!r})"
    there = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()} - {MANIFEST}
    if not files or there - set(files):
        return f"{MANIFEST} does not know {sorted(there - set(files)) or 'any file'}"
    for name, digest in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if _sha256(path / name) != digest:
            return f"{name} was altered or cut off"
    return None


def load(engine: Any, path: Path) -> int:
    """Put the state into the engine, on all ranks; the number of steps already done."""
    loaded, state = engine.load_checkpoint(str(path), tag=TAG, load_module_strict=False)
    if loaded is None:
        raise ValueError(f"{path}: DeepSpeed found no state in it")
    return int(state["step"])


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted({*old, *new})
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{where}.{k}".strip("."))]
    return [] if old == new else [f"{where} was {old!r}, is {new!r}"]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Checkpoints are complete or absent, and fit any number of ranks and any ZeRO stage.

A checkpoint is a folder `step-000123` of safetensors files, in which every trained parameter has its
weight and Adam's moments under its own name, and `manifest.json`: SHA-256 of every file, the step,
the run's identity, the loss scale. Schedule, data order and random numbers follow from the step.
It is written beside its place under another name, each rank a part of the parameters, and renamed
when all of it is on disk. Nothing in it is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from flamingo.data.writing import fingerprint, fsync_folder
from flamingo.train import engine as engines
from flamingo.train.engine import gather_objects, gathered
from flamingo.train.moments import Moments
from flamingo.train.precision import LossScale
from flamingo.written import share

MANIFEST, FORMAT = "manifest.json", "flamingo training 1"
CHUNK = 2 << 30  # bytes of a file, about
WEIGHT = "weight"
Parts = list[dict[str, Tensor]]


class Trained(Protocol):
    """What a checkpoint is made of: an engine, or whatever holds the same of a model that is trained."""

    @property
    def named(self) -> Mapping[str, Tensor]: ...

    @property
    def moments(self) -> Moments: ...

    @property
    def scale(self) -> LossScale: ...


class Checkpoints:
    """Writes the checkpoints of a run. All ranks call, at the same steps.

    background: the files are written by a thread while training goes on; `poll` after every step
    makes them a checkpoint as soon as all ranks have written theirs.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], keep: int = 2, background: bool = False):
        self.folder, self.identity, self.keep, self.background = folder, identity, keep, background
        self._thread: Thread | None = None
        self._failed: str | None = None
        self._step = 0

    def save(self, engine: Trained, step: int) -> None:
        """Write `folder/step-...` and remove all but the newest.

        Raises OSError on all ranks when any of them could not write; older checkpoints are intact.
        """
        self.finish()
        target = self.folder / f"step-{step:06d}"
        part = _aside(target)
        self._agree(lambda: _make_room(part) if dist.get_rank() == 0 else None, target)
        files = _snapshot(engine, copy=self.background)
        manifest = {"format": FORMAT, "step": step, "identity": self.identity}
        manifest |= {"loss_scale": engine.scale.state(), "ranks": dist.get_world_size()}
        self._step = step
        if self.background:
            self._thread = Thread(target=self._quietly, args=(part, files, manifest))
            self._thread.start()
        else:
            self._agree(lambda: _write(part, files), target)
            self._complete(target, manifest)

    def poll(self) -> None:
        """Complete what all ranks have written in the background; nobody waits. Raises OSError as `save`."""
        if self._thread is None:  # on all ranks or on none
            return
        writing = torch.tensor(int(self._thread.is_alive()), device=engines.device())
        if not engines.sum_over_ranks(writing).item():
            self.finish()

    def finish(self) -> None:
        """Wait for what is written in the background. Raises OSError as `save`."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        target = self.folder / f"step-{self._step:06d}"
        self._agree(self._told, target)
        self._complete(target, self._manifest)

    def _quietly(self, part: Path, files: Parts, manifest: dict[str, Any]) -> None:
        self._failed, self._manifest = None, manifest
        try:
            _write(part, files)
        except Exception as error:  # told by `finish`
            self._failed = str(error) or repr(error)

    def _told(self) -> None:
        if self._failed is not None:
            raise OSError(self._failed)

    def _complete(self, target: Path, manifest: dict[str, Any]) -> None:
        """Rank 0: the manifest, the rename, and room for the next."""

        def complete_it() -> None:
            if dist.get_rank() == 0:
                _rename(_aside(target), target, manifest)
                there = complete(self.folder)
                newest = there.index(target) + 1
                # Those of later steps are damaged ones, which this run went back behind.
                for old in there[: max(0, newest - self.keep)] + there[newest:]:
                    _remove(old)

        self._agree(complete_it, target)

    def _agree(self, act: Callable[[], Any], target: Path) -> None:
        """Every rank acts; when one fails, all fail with its words."""
        failed = None
        try:
            act()
        except Exception as error:  # safetensors has errors of its own for a full disk
            failed = str(error) or repr(error)
        free = shutil.disk_usage(_existing(self.folder)).free >> 20 if failed else 0
        told = enumerate(gather_objects((failed, free)))
        words = [(rank, words, free) for rank, (words, free) in told if words is not None]
        if words:
            if dist.get_rank() == 0:  # what is half written takes the room that is wanted
                shutil.rmtree(_aside(target), ignore_errors=True)
            rank, why, free = words[0]
            raise OSError(
                f"checkpoint {target} cannot be written ({free} MB are free there), rank {rank}: "
                f"{why}. The checkpoint before it is intact; make room and go on with --resume"
            )


def _existing(folder: Path) -> Path:
    return folder if folder.exists() else _existing(folder.parent)


def _aside(target: Path) -> Path:
    """Where a checkpoint is written."""
    return target.with_name(f".{target.name}.part")


def _remove(old: Path) -> None:
    """A run does not end because an old checkpoint stays."""
    try:
        shutil.rmtree(old)
    except OSError as error:
        warn(f"{old} is not needed any more and cannot be removed: {error}")


def _make_room(part: Path) -> None:
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)


def _snapshot(engine: Trained, copy: bool) -> Parts:
    """This rank's share of all trained state, on the CPU: every n-th parameter, n being the ranks.

    copy: also where the tensors are on the CPU already, because training goes on.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    files: Parts = [{}]
    size = 0
    for number, (name, parameter) in enumerate(engine.named.items()):
        with gathered([parameter]):
            weight = parameter.detach().to("cpu", copy=True) if number % ranks == rank else None
        state = engine.moments.read(name)
        if weight is None:
            continue
        if size > CHUNK:
            files.append({})
            size = 0
        files[-1][f"{WEIGHT}/{name}"] = weight
        for key, value in state.items():
            files[-1][f"{key}/{name}"] = value.detach().to("cpu", copy=copy).contiguous()
        size += sum(t.numel() * t.element_size() for t in (weight, *state.values()))
    return files


def _write(part: Path, files: Parts) -> None:
    """This rank's files, each on disk before its checksum is."""
    rank = dist.get_rank()
    cards = {}
    for number, tensors in enumerate(files):
        path = part / f"rank-{rank:05d}-{number:03d}.safetensors"
        save_file(tensors, path)
        share(path)
        _sync(path)
        cards[path.name] = fingerprint(path)
    card = part / f"rank-{rank:05d}.json"
    card.write_text(json.dumps(cards))
    _sync(card)


def _rename(part: Path, target: Path, manifest: dict[str, Any]) -> None:
    files: dict[str, Any] = {}
    for card in sorted(part.glob("rank-*.json")):
        files |= json.loads(card.read_text())
        card.unlink()
    told = {**manifest, "files": files}
    (part / MANIFEST).write_text(json.dumps({**told, "sha256": _digest(told)}, indent=1))
    _sync(part / MANIFEST)
    fsync_folder(part)
    shutil.rmtree(target, ignore_errors=True)  # the same step of an earlier, damaged attempt
    part.rename(target)
    fsync_folder(target.parent)


def _digest(manifest: dict[str, Any]) -> str:
    """Of all that a manifest says but this."""
    told = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


# -- finding and reading -----------------------------------------------------------------------


def complete(folder: Path) -> list[Path]:
    """Folders that were renamed into place, oldest first."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def newest(folder: Path, identity: dict[str, Any] | None, warn: Callable[[str], Any] = warn) -> Path | None:
    """The newest undamaged checkpoint; a damaged one is named and the one before it taken.

    identity: of the run that goes on; None: any.

    Raises ValueError when it belongs to a run with other settings, or when all are damaged.
    """
    found = complete(folder)
    for path in reversed(found):
        damaged = damage(path)
        if damaged:
            warn(f"{path}: {damaged}; trying the checkpoint before it")
            continue
        changed = differences(read_manifest(path)["identity"], identity) if identity is not None else []
        if changed:
            raise ValueError(
                f"{path} is from other settings ({'; '.join(changed)}): "
                "set them back, or choose another folder with run=FOLDER"
            )
        return path
    if found:
        raise ValueError(f"{folder}: all {len(found)} checkpoints are damaged; start again with run=FOLDER")
    return None


def read_manifest(path: Path) -> dict[str, Any]:
    return json.loads((path / MANIFEST).read_text())


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, None when every file is as its manifest says."""
    try:
        manifest = read_manifest(path)
        files, _, _ = dict(manifest["files"]), manifest["identity"], int(manifest["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({error!r})"
    if manifest.get("format") != FORMAT:
        return f"{MANIFEST} is of another format, {manifest.get('format')!r}, not {FORMAT!r}"
    if manifest.get("sha256") != _digest(manifest):
        return f"{MANIFEST} was altered"
    there = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()} - {MANIFEST}
    if not files or there - set(files):
        return f"{MANIFEST} does not know {sorted(there - set(files)) or 'any file'}"
    for name, told in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        try:
            found = fingerprint(path / name)
        except OSError as error:
            return f"{name} cannot be read ({error})"
        if found != told:
            return f"{name} was altered or cut off"
    return None


class Saved:
    """The tensors of a checkpoint, each read when it is asked for.

    Nothing is checked before `check` is called. Its files stay open until `close`.
    """

    def __init__(self, path: Path):
        from safetensors import safe_open

        self.path, self.manifest = path, read_manifest(path)
        self.step = int(self.manifest["step"])
        self.files = [safe_open(path / name, framework="pt") for name in sorted(self.manifest["files"])]
        self.home = {name: file for file in self.files for name in file.keys()}  # noqa: SIM118 - no dict

    def close(self) -> None:
        """What is open cannot be removed everywhere (NFS)."""
        self.files, self.home = [], {}

    @property
    def names(self) -> set[str]:
        """Of the trained parameters."""
        return {name.partition("/")[2] for name in self.home if name.startswith(f"{WEIGHT}/")}

    def __call__(self, kind: str, name: str) -> Tensor:
        return self.home[f"{kind}/{name}"].get_tensor(f"{kind}/{name}")

    def check(self, named: Mapping[str, Tensor], new: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        """Raises ValueError unless it holds just these parameters; `new` ones may be missing."""
        missing, unknown = sorted(set(named) - self.names - new), sorted(self.names - set(named))
        if missing or unknown:
            raise ValueError(
                f"{self.path} is of another model: it lacks {missing[:3] or 'nothing'}, and holds "
                f"{unknown[:3] or 'nothing'} too much; set `model` back, or choose run=FOLDER"
            )
        for name in sorted(self.names):
            shape = tuple(self.home[f"{WEIGHT}/{name}"].get_slice(f"{WEIGHT}/{name}").get_shape())
            wanted = tuple(getattr(named[name], "ds_shape", named[name].shape))
            if shape != wanted:
                raise ValueError(
                    f"{self.path} is of another model: {name} is {list(shape)}, not {list(wanted)}; put what "
                    "model.language and model.vision name back, or choose run=FOLDER"
                )

    @torch.no_grad()
    def weights_into(self, named: Mapping[str, Tensor]) -> None:
        """Put the weights into parameters, before an engine takes them."""
        for name in sorted(self.names):
            with gathered([named[name]], changed=True):
                if not hasattr(named[name], "ds_id") or dist.get_rank() == 0:
                    named[name].copy_(self(WEIGHT, name))

    @torch.no_grad()
    def moments_into(self, engine: Trained) -> None:
        """Put the optimizer's state and the loss scale into an engine."""
        kinds = (*engines.KEYS, engines.STEP)
        for name in sorted(self.names.intersection(engine.named)):  # all ranks in one order
            engine.moments.write(name, {kind: self(kind, name) for kind in kinds})
        engine.scale.restore(self.manifest["loss_scale"])


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted({*old, *new})
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{where}.{k}".strip("."))]
    return [] if old == new else [f"{where} was {old!r}, is {new!r}"]

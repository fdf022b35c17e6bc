"""`flamingo data verify`: every fault of every shard, with shard, key and byte; clean copies of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from flamingo.data.errors import BadSample
from flamingo.data.kinds import Reader, reader
from flamingo.data.places import expand, names_of
from flamingo.data.tools.executors import Executor, Outcome, Task
from flamingo.data.tools.outputs import claim, finish, finished
from flamingo.data.tools.salvage import Fault, Found, salvage
from flamingo.data.writing import CARD, TarSample, fingerprint, write_tar


@dataclass(frozen=True)
class _Check:
    """The argument of a task. expected: what dataset.json says about the file."""

    path: str
    name: str
    kind: str | None
    options: Mapping[str, Any]
    largest: int
    expected: Mapping[str, Any] | None
    out: str | None


@dataclass(frozen=True)
class Report:
    """shards: name -> {"samples": good ones, "faults": list of {key, offset, fault, detail}}."""

    shards: Mapping[str, Mapping[str, Any]]
    outcome: Outcome

    @property
    def faults(self) -> list[tuple[str, Fault]]:
        """(shard, fault), in the order of shards and bytes."""
        return [(name, Fault(**fault)) for name, told in self.shards.items() for fault in told["faults"]]

    def counts(self) -> dict[str, int]:
        return dict(Counter(fault.fault for _, fault in self.faults))


def verify(
    patterns: Sequence[str],
    kind: str | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    repair: Path | None = None,
    max_sample_mb: int = 256,
    executor: Executor | None = None,
) -> Report:
    """Read every header and, with a kind, decode every sample; compare checksums with dataset.json.

    repair: a folder for clean copies of all shards: their good samples, members byte for byte.
    A second sample with the same key is kept as KEY-2.

    Raises:
        ValueError: no such shards or kind, or `repair` is not a folder for them.
    """
    if kind is not None:
        reader(kind, options or {})
    elif options:
        raise ValueError(f"--options {dict(options)} are of a kind: name it with --kind")
    paths = expand(patterns)
    names = [name.replace("/", "_") for name in names_of(paths)]
    if len(set(names)) < len(names):  # a/b.tar and a_b.tar
        names = [f"{number:06d}-{name}" for number, name in enumerate(names)]
    cards = {folder: _card(folder) for folder in {path.parent for path in paths}}
    if repair is not None:
        # With sizes and times: a copy of what a shard was before would not be its copy.
        wanted = {"repaired": sorted(map(_state, paths)), "kind": kind, "options": dict(options or {})}
        claim(repair, {**wanted, "max_sample_mb": max_sample_mb})
    tasks = [
        Task(
            name,
            _check,
            _Check(
                str(path),
                name,
                kind,
                options or {},
                max_sample_mb << 20,
                cards[path.parent].get(path.name),
                str(repair) if repair else None,
            ),
        )
        for path, name in zip(paths, names, strict=True)
    ]
    outcome = (executor or Executor()).run(tasks, "verifying")
    if repair is not None:
        finish(repair, names, {"repaired": len(names), "kind": kind})
    shards = {**outcome.results, **_missing(cards)}
    return Report(shards, outcome)


def _state(path: Path) -> str:
    stat = path.stat()
    return f"{path.absolute()}, {stat.st_size} bytes, {stat.st_mtime_ns}"


def _card(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / CARD).read_bytes())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _missing(cards: Mapping[Path, Mapping[str, Any]]) -> dict[str, Any]:
    """Shards that dataset.json lists and that are not there."""
    lost = [folder / name for folder, card in cards.items() for name in card if not (folder / name).is_file()]
    fault = Fault(None, 0, "missing shard", f"{CARD} lists it")
    return {str(path): {"samples": 0, "faults": [fault._asdict()]} for path in lost}


def _check(work: _Check) -> dict[str, Any]:
    """The task: the report of one shard, and its clean copy if one is wanted."""
    path = Path(work.path)
    samples, faults = salvage(path, decoded=work.kind is not None)
    faults += _checksum(path, work.expected)
    with open(path, "rb") as file:
        read = reader(work.kind, work.options) if work.kind is not None else None
        checked = [(sample, _fault(file, sample, read, work.largest)) for sample in samples]
        faults += [fault for _, fault in checked if fault]
        samples = [sample for sample, fault in checked if fault is None]
        told = {
            "samples": len(samples),
            "faults": [fault._asdict() for fault in sorted(faults, key=lambda fault: fault.offset)],
        }
        if work.out:
            held = finished(Path(work.out), work.name, lambda new: _copy(file, samples, new))
            told["repaired"] = held["samples"]
    return told


def _checksum(path: Path, expected: Mapping[str, Any] | None) -> list[Fault]:
    if expected is None:
        return []
    found = fingerprint(path)
    different = [name for name in ("bytes", "sha256") if name in expected and expected[name] != found[name]]
    told = ", ".join(f"{name} {found[name]}, not {expected[name]}" for name in different)
    return [Fault(None, 0, "not the file of dataset.json", told)] if different else []


def _fault(file: BinaryIO, sample: Found, read: Reader | None, largest: int) -> Fault | None:
    if (size := sum(size for _, size in sample.members.values())) > largest:
        return Fault(sample.key, sample.offset, "too large sample", f"{size} bytes, allowed are {largest}")
    if read is None:
        return None
    try:
        read(_members(file, sample), sample.key)
    except BadSample as error:
        return Fault(sample.key, sample.offset, error.fault, error.detail)
    return None


def _members(file: BinaryIO, sample: Found) -> dict[str, bytes]:
    members = {}
    for name, (offset, size) in sample.members.items():
        file.seek(offset)
        members[name] = file.read(size)
    return members


def _copy(file: BinaryIO, samples: Sequence[Found], new: Path) -> dict[str, Any]:
    used = {sample.key for sample in samples}

    def clean() -> Iterator[TarSample]:
        for sample in samples:
            key, _, number = sample.key.partition("\n")
            while number and f"{key}-{number}" in used:
                number += "0"
            yield f"{key}-{number}" if number else key, _members(file, sample)

    return {"samples": write_tar(new, clean())}

"""Rows of inputs -> shards: which rows each one holds, as a pure function of the inputs."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from flamingo.data.errors import BadSample
from flamingo.data.tools.executors import Executor, Outcome, Task
from flamingo.data.tools.outputs import claim, finish, finished
from flamingo.data.tools.tables import Row, Run, form_of, length, read_run, rows_with_places
from flamingo.data.writing import DatasetCard, TarSample, write_tar

SHOWN = 3  # rows left out that a shard's card tells in full


class Layout(Protocol):
    """How a row becomes a sample. Pickles."""

    @property
    def root(self) -> str | None:
        """Folder that pictures are read from; None: no files are read."""
        ...

    @property
    def kind(self) -> str:
        """Of the samples, for the recipe."""
        ...

    def settings(self) -> dict[str, str]:
        """What the bytes of the shards depend on, beside the rows."""
        ...

    def columns(self) -> list[str]:
        """What every row must have."""
        ...

    def members(self, row: Row) -> Mapping[str, bytes]:
        """Member extension -> bytes; raises BadSample for a row that cannot be used."""
        ...

    def weigh(self, row: Row) -> int:
        """About how many bytes the sample will take, without reading pictures."""
        ...


@dataclass(frozen=True)
class Shard:
    """The rows of one shard; `first` is the number of its first row among all."""

    name: str
    first: int
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class _Work:
    """The argument of a task."""

    out: str
    shard: Shard
    layout: Layout


@dataclass(frozen=True)
class Made:
    """What came of it. `card`: None as long as other parts have not made theirs."""

    outcome: Outcome
    card: DatasetCard | None
    left_out: Mapping[str, int]
    examples: Sequence[str]


def make_shards(
    inputs: Sequence[Path],
    out: Path,
    layout: Layout,
    *,
    name: str,
    samples: int | None = None,
    megabytes: int | None = None,
    executor: Executor | None = None,
    licence: str = "",
) -> Made:
    """Write the rows of the inputs as shards NAME-000000.tar, ... into `out`.

    samples, megabytes: of a shard; exactly one of them. Rows that cannot be used are left out and
    counted. Shards that are there already, complete, stay as they are.

    Raises:
        ValueError: an input or `out` is not what it must be, or there is no row.
    """
    if (samples is None) == (megabytes is None):
        raise ValueError("give either --samples-per-shard or --megabytes-per-shard")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):  # never a path that leads out of `out`
        raise ValueError(f"--name {name!r}: letters, digits and _ . - only, and not . or - first")
    if twice := [str(path) for path, n in Counter(map(os.path.realpath, inputs)).items() if n > 1]:
        raise ValueError(f"{twice[0]} is given twice: name every input once")
    _check_columns(inputs, layout)
    shards = plan(inputs, name, samples, megabytes, layout)
    settings = {**layout.settings(), "kind": layout.kind, "rows": _digest(inputs)}
    limit = {"samples per shard": samples} if samples else {"megabytes per shard": megabytes}
    # Not a part of the card: where pictures lie says nothing about the shards once they are made.
    root = os.path.abspath(layout.root) if layout.root is not None else None
    claim(out, {**settings, **limit, "shards": len(shards), "pictures": root})
    tasks = [Task(shard.name, _write, _Work(str(out), shard, layout)) for shard in shards]
    outcome = (executor or Executor()).run(tasks, "writing")
    left_out: Counter[str] = Counter()
    for told in outcome.results.values():
        left_out.update(told["left_out"])
    examples = [line for told in outcome.results.values() for line in told["examples"]]
    if len(outcome.results) == len(shards) and not any(t["samples"] for t in outcome.results.values()):
        told = "; ".join(examples[:SHOWN])
        raise ValueError(f"none of the rows could be used: {told} (before another try delete {out})")
    card = finish(out, [shard.name for shard in shards], {**settings, **limit}, licence)
    return Made(outcome, card, left_out, examples)


def _check_columns(inputs: Sequence[Path], layout: Layout) -> None:
    """A column that is not there is one mistake, not one of every row: said before any work."""
    for path in inputs:
        for _, row in rows_with_places(path):
            if missing := [name for name in layout.columns() if name not in row]:
                held = ", ".join(map(str, row)) or "nothing"
                raise ValueError(f"{path} has no column {missing[0]!r}; it has {held}")
            break


def _write(work: _Work) -> dict[str, Any]:
    """The task: one shard, complete or absent. Keys are the numbers of the rows among all inputs."""
    left_out: Counter[str] = Counter()
    examples: list[str] = []

    def samples() -> Iterator[TarSample]:
        rows = (row for run in work.shard.runs for row in read_run(run))
        for number, row in enumerate(rows, work.shard.first):
            try:
                yield f"{number:09d}", work.layout.members(row)
            except BadSample as error:
                left_out[error.fault] += 1
                if len(examples) < SHOWN:
                    examples.append(f"row {number}: {error}")

    def fill(path: Path) -> dict[str, Any]:
        return {"samples": write_tar(path, samples()), "left_out": dict(left_out), "examples": examples}

    return finished(Path(work.out), work.shard.name, fill)


def plan(
    inputs: Sequence[Path], name: str, samples: int | None, megabytes: int | None, layout: Layout
) -> list[Shard]:
    """Which rows each shard holds; a shard may span inputs.

    Raises ValueError when there is no row.
    """
    groups: list[list[Run]] = []
    room = 0.0
    for path, place, count, weight in _pieces(inputs, samples, megabytes, layout):
        if room <= 0:
            groups.append([])
            room = float(samples or (megabytes or 0) << 20)
        room -= count if samples else weight
        last = groups[-1][-1] if groups[-1] else None
        if last and last.file == str(path):
            groups[-1][-1] = Run(last.file, last.place, last.count + count)
        else:
            groups[-1].append(Run(str(path), place, count))
    if not groups:
        raise ValueError(f"{', '.join(map(str, inputs))}: there is no row to write")
    shards, first = [], 0
    for number, runs in enumerate(groups):
        shards.append(Shard(f"{name}-{number:06d}.tar", first, tuple(runs)))
        first += sum(run.count for run in runs)
    return shards


def _pieces(
    inputs: Sequence[Path], samples: int | None, megabytes: int | None, layout: Layout
) -> Iterator[tuple[Path, int, int, int]]:
    """(input, place, rows, bytes) of stretches that stay together: mostly single rows."""
    held = 0  # rows of the shard that is being filled
    for path in inputs:
        total = length(path) if samples else None
        if samples and total is not None:  # nothing needs to be read
            place = 0
            while place < total:
                count = min(samples - held, total - place)
                yield path, place, count, 0
                place, held = place + count, (held + count) % samples
            continue
        for place, row in _counted(rows_with_places(path)):
            yield path, place, 1, 0 if samples else layout.weigh(row)
            held = (held + 1) % samples if samples else 0


def _counted(rows: Iterator[tuple[int, Row]]) -> Iterator[tuple[int, Row]]:
    from tqdm import tqdm

    return iter(tqdm(rows, "listing", unit="row", disable=not sys.stderr.isatty()))


def _digest(inputs: Sequence[Path]) -> str:
    """SHA-256 over the names, sizes and times of all input files, captions among them."""
    digest = hashlib.sha256()
    for path in inputs:
        files = [path]
        if path.is_dir():
            folder = form_of(path) == "folder"
            files = [path / name for name in _members(path)] if folder else sorted(path.rglob("*"))
        for file in files:
            stat = os.stat(file)
            told = f"{os.path.relpath(file, path.parent)} {stat.st_size} {stat.st_mtime_ns}\n"
            digest.update(told.encode(errors="surrogateescape"))
    return digest.hexdigest()


def _members(folder: Path) -> Iterator[str]:
    """All files of a folder that go into its shards."""
    for _, row in rows_with_places(folder):
        yield from filter(None, row.values())

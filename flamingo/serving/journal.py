"""What a batch run leaves on the disk: answers as they come, and in the end one file in order.

OUTPUT.run/ holds plan.json, which says of what they are the answers, and while a run lasts one
part-RANK.jsonl per process. A line is written whole or dropped when the run goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from flamingo.serving.prompt import Sampling
from flamingo.serving.requests import Request

Record = dict[str, Any]
WAIT_SECONDS = 10.0  # for processes of a killed run, which end by themselves


@dataclass(frozen=True)
class Plan:
    """What answers depend on. input: digest of the file; model: digest of its config, with size and
    time of its weights."""

    input: str
    model: str
    style: str
    sampling: dict[str, Any]

    @classmethod
    def of(cls, source: Path, model: Path, style: str, sampling: Sampling) -> Plan:
        digest = hashlib.sha256((model / "config.json").read_bytes())
        for file in sorted(model.glob("*.safetensors")):
            stat = file.stat()
            digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
        return cls(_digest(source.read_bytes()), digest.hexdigest()[:16], style, asdict(sampling))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


class Journal:
    """The answers of one output file, found again by whoever goes on."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output.with_name(f"{output.name}.run")
        self.plan = self.folder / "plan.json"

    @contextmanager
    def claimed(self, plan: Plan) -> Iterator[None]:
        """Held by whoever runs, and the plan written.

        Raises ValueError for answers to something else, an output that is not ours, or while another
        run writes it.
        """
        if not self.plan.exists() and self.output.exists():
            raise ValueError(
                f"{self.output} is there already, and {self.plan}, which says to what it answers, is not: "
                "remove it, or choose another --output"
            )
        self.check(plan)
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._held(self.folder / "run.lock"):
            for lock in self.folder.glob("part-*.lock"):
                with self._held(lock):
                    pass
            self.check(plan)
            _replace(self.plan, json.dumps(asdict(plan), indent=1) + "\n")
            yield

    def check(self, plan: Plan) -> None:
        """Raises ValueError, naming what differs, when the answers are to something else."""
        if not self.plan.exists():
            return
        try:
            before = json.loads(self.plan.read_text())
        except ValueError:
            raise ValueError(f"{self.plan} is damaged: {self._remedy()}") from None
        now = asdict(plan)
        differ = [f"the {name} changed" for name in ("input", "model") if now[name] != before.get(name)]
        old, new = ({"style": p.get("style"), **(p.get("sampling") or {})} for p in (before, now))
        differ += [
            f"{name} was {old.get(name)!r}, is {value!r}"
            for name, value in new.items()
            if value != old.get(name)
        ]
        if differ:
            raise ValueError(f"{self.output} answers something else ({'; '.join(differ)}): {self._remedy()}")

    def _remedy(self) -> str:
        return f"remove {self.folder} and {self.output} to ask anew, or choose another --output"

    @contextmanager
    def _held(self, path: Path) -> Iterator[None]:
        try:
            with FileLock(path, timeout=WAIT_SECONDS):
                yield
        except Timeout:
            raise ValueError(
                f"another process is writing {self.output} ({path} is locked): wait for it, or end it"
            ) from None

    def records(self) -> dict[str | int, Record]:
        """The latest of each id; one with an answer is never replaced by one without."""
        found: dict[str | int, Record] = {}
        for path in (self.output, *sorted(self.folder.glob("part-*.jsonl"))):
            for record in _read(path):
                if "answer" in record or "answer" not in found.get(record["id"], {}):
                    found[record["id"]] = record
        return found

    def answered(self) -> set[str | int]:
        return {key for key, record in self.records().items() if "answer" in record}

    @contextmanager
    def part(self, rank: int) -> Iterator[Any]:
        """Gives a function that adds records to the file of one process."""
        path = self.folder / f"part-{rank}.jsonl"
        with self._held(self.folder / f"part-{rank}.lock"):
            if path.exists():  # half a line of a killed run would be written onto
                os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
            with path.open("ab") as file:

                def add(records: Iterable[Record]) -> None:
                    file.write(b"".join(map(_line, records)))
                    file.flush()

                yield add

    def finish(self, requests: Sequence[Request]) -> list[Record]:
        """Writes the output, in the order of the prompts; the parts go. The records.

        Raises ValueError where a prompt has no record.
        """
        records = self.records()
        missing = [request.id for request in requests if request.id not in records]
        if missing:
            raise ValueError(
                f"{self.output}: {len(missing)} prompts have no answer, as {missing[0]!r}: give the same "
                "command again"
            )
        ordered = [records[request.id] for request in requests]
        _replace(self.output, b"".join(map(_line, ordered)).decode(), self.folder)
        for path in (*self.folder.glob("part-*.jsonl"), *self.folder.glob("part-*.lock")):
            path.unlink()
        return ordered


def _line(record: Record) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _read(path: Path) -> Iterator[Record]:
    """Its whole lines; what a killed process left half is not one."""
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("id"), (str, int)):
            yield record


def _replace(path: Path, text: str, folder: Path | None = None) -> None:
    """All of it or nothing. folder: for the scratch file, on the same disk."""
    scratch = (folder or path.parent) / f"{path.name}.part"
    with scratch.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)

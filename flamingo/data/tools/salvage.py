"""All sound samples of a damaged tar, and a name for every damage.

`shards.build_index` trusts a shard or refuses it. Here the reading goes on behind a damage: at the
next block that is a sound tar header, by its magic and its checksum.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from flamingo.data.index import BLOCK, Bounded, sample_name

MAGIC, MAGIC_AT = b"ustar", 257
_PACKED = ((b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ", "xz"), (b"\x28\xb5\x2f\xfd", "zstd"))


class Fault(NamedTuple):
    """What is wrong at a byte of a shard. key: of the sample concerned, if it is known."""

    key: str | None
    offset: int
    fault: str
    detail: str


@dataclass
class Found:
    """One sample: its members' data, (offset, size) in bytes.

    near: a damage lies within it or beside it; broken: a member of it is known to be lost.
    """

    key: str
    offset: int
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    near: bool = False
    broken: bool = False


def salvage(path: Path, decoded: bool = False) -> tuple[list[Found], list[Fault]]:
    """The samples of a tar that are whole, as far as headers tell, and all damages.

    decoded: whether a kind looks at them next. If not, a sample beside a damage is whole only if
    it has the members of an undamaged one.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(6)
        packed = next((name for magic, name in _PACKED if start.startswith(magic)), None)
        if not size or packed:
            what = f"compressed with {packed}: unpack it" if packed else "the file is empty"
            return [], [Fault(None, 0, "not a plain tar", what)]
        samples = _Samples()
        for event in _walk(file, size):
            if isinstance(event, Fault):
                samples.damage(event)
            else:
                samples.member(event)
    return samples.whole(decoded), samples.faults


def _walk(file: BinaryIO, size: int) -> Iterator[tarfile.TarInfo | Fault]:
    """Members and damages in the order of the file."""
    position: int | None = 0
    while position is not None:
        end, stopped = position, ""
        file.seek(position)
        try:
            # From here to the end marker, or to the next damage.
            for info in tarfile.TarFile(fileobj=Bounded(file), mode="r"):  # type: ignore[arg-type]
                end = info.offset_data + info.size
                if info.size < 0 or end > size:
                    stopped = f"{info.name} would end at byte {end}, the file ends at {size}"
                    yield Fault(sample_name(info.name)[0], info.offset, "truncated member", stopped)
                    end = info.offset_data
                    break
                yield info
                end += -end % BLOCK
        except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
            sound = _sound(file, end)
            if sound and end == position:  # a header that is one, and yet cannot be followed
                stopped = str(error)
                yield Fault(None, end, "damaged header", stopped)
                end += 1
            elif end != position:
                stopped = str(error)
                if not sound:  # else the next round tells
                    yield Fault(None, end, "damaged header", stopped)
        if not stopped:
            fault, end = _ending(file, end, size)
            if fault:
                yield fault
            elif fault is None and end >= size:
                return
        position = _next_header(file, end, size)


def _ending(file: BinaryIO, end: int, size: int) -> tuple[Fault | None, int]:
    """What is wrong with the end of an archive at byte `end`, and where to read on."""
    file.seek(end)
    marker = file.read(BLOCK)
    if len(marker) < BLOCK:
        return Fault(None, end, "no end marker", f"the file stops at byte {size}"), size
    if any(marker):
        return Fault(None, end, "damaged header", "not a tar header"), end + 1
    at = end + BLOCK
    while block := file.read(1 << 20):
        if rest := block.lstrip(b"\0"):
            at += len(block) - len(rest)
            return Fault(None, at, "data after the end", "tars joined by cat, or a header wiped out?"), at
        at += len(block)
    return None, size


def _next_header(file: BinaryIO, start: int, size: int) -> int | None:
    """The first byte from `start` on where a sound header begins; None: there is none."""
    position = start
    while position < size:
        file.seek(position)
        block = file.read(1 << 20)
        found = block.find(MAGIC)
        while found >= 0:
            header = position + found - MAGIC_AT
            if header >= start and _sound(file, header):
                return header
            found = block.find(MAGIC, found + 1)
        if position + len(block) >= size:
            return None
        position += len(block) - len(MAGIC) + 1
    return None


def _sound(file: BinaryIO, position: int) -> bool:
    file.seek(position)
    try:
        tarfile.TarInfo.frombuf(file.read(BLOCK), "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError):
        return False
    return True


def _shape(sample: Found, numbers: bool) -> frozenset[str]:
    """Endings of the members. Without numbers: documents with one, two, ... images are alike."""
    return frozenset(name if numbers else re.sub(r"^\d+\.", "N.", name) for name in sample.members)


class _Samples:
    """Members become samples; damages leave their mark on those beside them."""

    def __init__(self) -> None:
        self.found: dict[str, Found] = {}
        self.faults: list[Fault] = []
        self.current: Found | None = None
        self.after_damage = False

    def damage(self, fault: Fault) -> None:
        self.faults.append(fault)
        self.after_damage = True
        if self.current:
            self.current.near = True
        if fault.key is not None:  # the member with this header is lost
            self._sample(fault.key, fault.offset).broken = True

    def member(self, info: tarfile.TarInfo) -> None:
        key, extension = sample_name(info.name)
        if info.isdir() or key is None or extension is None:
            return
        sample = self._sample(key, info.offset)
        if not info.isreg() or info.issparse():
            self._break(sample, info, "link or sparse member", f"{info.name} is not a regular file")
        elif extension in sample.members:
            self._break(sample, info, "second member of this name", info.name)
        else:
            sample.members[extension] = (info.offset_data, info.size)

    def whole(self, decoded: bool) -> list[Found]:
        """The samples of which nothing is known to be lost. Notes the others as faults."""
        sound = [sample for sample in self.found.values() if not sample.near and not sample.broken]
        shapes = {_shape(sample, numbers=decoded) for sample in sound}
        for sample in self.found.values():
            held = _shape(sample, numbers=decoded)
            if decoded:  # where the sound ones differ, the kind knows better
                missing = next(iter(shapes)) - held if len(shapes) == 1 else frozenset()
            else:
                larger = [] if held in shapes else [shape - held for shape in shapes if shape > held]
                missing = min(
                    larger, key=lambda members: (len(members), sorted(members)), default=frozenset()
                )
            if sample.near and not sample.broken and missing:
                sample.broken = True
                what = f"a damage took its {', '.join(sorted(missing))}"
                self.faults.append(Fault(sample.key, sample.offset, "incomplete sample", what))
        return [sample for sample in self.found.values() if not sample.broken]

    def _sample(self, key: str, offset: int) -> Found:
        """The sample that is being read, or a new one."""
        if self.current is None or self.current.key.partition("\n")[0] != key:
            name = key
            if key in self.found:
                what = "kept under another name by --repair; keys must be unique, members adjacent"
                self.faults.append(Fault(key, offset, "second sample with this key", what))
                # No key of a tar member that is read here holds a line feed and a number.
                name = f"{key}\n{sum(k.partition(chr(10))[0] == key for k in self.found) + 1}"
            self.current = self.found[name] = Found(name, offset)
            self.current.near = self.after_damage
        elif self.after_damage:
            self.current.near = True
        self.after_damage = False
        return self.current

    def _break(self, sample: Found, info: tarfile.TarInfo, fault: str, detail: str) -> None:
        sample.broken = True
        self.faults.append(Fault(sample.key, info.offset, fault, detail))

"""Index of a plain WebDataset tar: where each sample lies.

A shard is an ordinary, uncompressed tar. Members KEY.EXT that share KEY and follow each other form
a sample; EXT is all that follows the first dot of the base name, in lower case. The headers of a
shard are read once, checked to the last byte (webdataset itself stops silently at a damaged
header), and kept beside the shard, or in the user's cache folder if that is read-only.
Nothing here runs a command, unpickles, or turns a name from a tar into a path.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import tarfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from flamingo.data.errors import ShardError

log = logging.getLogger(__name__)

INDEX_VERSION = 1
BLOCK = 512  # tar works in blocks of so many bytes
PROBES = 64  # samples whose headers are compared with a stored index
SMALL = 32 << 20  # bytes of a shard that is read whole for its index without being asked
SHORT_NAME, HUGE = 100, 8 << 30  # bytes of a name and of a file that every tar header can tell
LONGEST_NAME = 1 << 20  # bytes of an extended header; a larger one is damage or an attack
_NAME = re.compile(r"(?!__[^/]*__/)((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)  # webdataset's rule

Sample = tuple[str, dict[str, tuple[int, int]]]  # key, member -> (offset, size), in bytes


@dataclass(frozen=True)
class ShardIndex:
    """Where each sample of a shard lies.

    Attributes:
        size, mtime_ns: of the tar; they tell whether the index still holds.
        count: samples.
        table: JSON of `samples()`. Kept as bytes: most shards are only counted.
        content: SHA-256 of the whole tar, "" where nobody has read all of it: it tells a shard that
            was altered in place, with members of the same sizes.
    """

    size: int
    mtime_ns: int
    count: int
    table: bytes
    content: str = ""

    def samples(self) -> list[Sample]:
        """Key and members of every sample, in the order of the tar."""
        return json.loads(self.table)

    def checked(self) -> list[Sample]:
        """`samples()`, once every member lies within the shard: an index may come from anywhere.

        Raises:
            ValueError: it does not, or the table is something else.
        """
        samples = self.samples()
        try:
            good = len(samples) == self.count and all(
                isinstance(key, str)
                and members
                and all(
                    offset >= 0 and size >= 0 and offset + size <= self.size
                    for offset, size in members.values()
                )
                for key, members in samples
            )
        except (TypeError, ValueError, AttributeError):
            good = False
        if not good:
            raise ValueError("the stored index does not fit the shard: delete it, and it is built again")
        return samples

    def digest(self, name: str) -> str:
        """SHA-256 over name, size and member table (not the time: a copy is the same shard)."""
        return sha256(f"{name}\n{self.size}\n".encode(errors="surrogateescape") + self.table)


class Bounded:
    """A file that refuses large reads: tarfile takes the sizes of extended headers as they are."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if size > LONGEST_NAME:
            raise tarfile.ReadError(f"an extended header of {size} bytes")
        return self.file.read(size)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def build_index(path: Path, content: bool = False) -> ShardIndex:
    """Read all tar headers of a shard; with `content`, or if it is small, all of it.

    Raises:
        ShardError: truncated, damaged, compressed, a link or sparse member, or one key twice.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    key: str | None = None
    end = 0  # of the last sound member, for the message
    with open(path, "rb") as file:
        stat = os.fstat(file.fileno())
        try:
            with tarfile.open(fileobj=Bounded(file), mode="r:") as tar:  # type: ignore[call-overload]
                for info in tar:
                    if info.size < 0:  # would send the loop back to the start
                        raise tarfile.TarError("negative size")
                    end = info.offset_data + info.size
                    if end > stat.st_size:
                        what = f"truncated: {info.name} ends at byte {end}, the file at {stat.st_size}"
                        raise ShardError(path, what, sample_name(info.name)[0] or key, info.offset_data)
                    key = _add(path, info, samples, key)
                end = tar.offset
        except ShardError:
            raise
        except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
            hint = "" if samples else " (shards must be plain tars: unpack .tar.gz and the like)"
            raise ShardError(path, f"not a sound tar: {error}{hint}", key, end) from error
        _check_end(file, path, end, key)
        read = _content(file) if content or stat.st_size <= SMALL else ""
    table = json.dumps(list(samples.items()), separators=(",", ":")).encode()
    return ShardIndex(stat.st_size, stat.st_mtime_ns, len(samples), table, read)


def _content(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def first_misfit(descriptor: int, samples: list[Sample]) -> tuple[str, int] | None:
    """Key and byte of a member that the tar does not have where its index says; None: it fits.

    Tars are padded to round sizes, so the index of another one may well have the right size. Of
    many samples `PROBES` are looked at, spread over the shard.
    """
    for key, members in samples[:: max(1, len(samples) // PROBES)] + samples[-1:]:
        for extension, (offset, size) in members.items():
            block = os.pread(descriptor, BLOCK, max(0, offset - BLOCK))
            try:
                info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except (tarfile.TarError, ValueError):
                return key, offset
            name = f"{key}.{extension}"
            # A long or foreign name, and the size of a huge file, stand in an extended header.
            named = len(name) > SHORT_NAME or not name.isascii() or sample_name(info.name) == (key, extension)
            if not named or info.size not in (size, 0 if size >= HUGE else size):
                return key, offset
    return None


def sample_name(member: str) -> tuple[str, str] | tuple[None, None]:
    """Name of a tar member -> key of its sample, extension; None, None: it belongs to none."""
    match = _NAME.fullmatch(member)
    return (match[1], match[2].lower()) if match else (None, None)


def _add(
    path: Path,
    info: tarfile.TarInfo,
    samples: dict[str, dict[str, tuple[int, int]]],
    current: str | None,
) -> str | None:
    """Enter one member into `samples`; return the key of the sample that is being read."""
    key, extension = sample_name(info.name)
    if info.isdir() or key is None or extension is None:  # README, ._resource-fork, __meta__/
        return current
    if not info.isreg() or info.issparse():
        what = f"member {info.name} is a link or sparse: write it again with tar --hard-dereference -h"
        raise ShardError(path, what, key, info.offset)
    if key != current and key in samples:
        what = "a second sample with this key: keys must be unique, and members of a sample adjacent"
        raise ShardError(path, what, key, info.offset)
    members = samples.setdefault(key, {})
    if extension in members:
        raise ShardError(path, f"a second member {extension!r} in this sample", key, info.offset)
    members[extension] = (info.offset_data, info.size)
    return key


def _check_end(file: BinaryIO, path: Path, end: int, key: str | None) -> None:
    """`end` must be where the tar says that it ends, with nothing but padding behind it.

    tarfile takes a damaged header, or none, for the end, and all samples behind it would be lost.
    """
    file.seek(end)
    marker = file.read(BLOCK)
    if len(marker) < BLOCK:
        what = "truncated: the end-of-archive marker is missing, so samples may be too; copy it again"
        raise ShardError(path, what, key, end)
    if any(marker):
        raise ShardError(path, "damaged header after this sample: copy the shard again", key, end)
    while rest := file.read(1 << 20):
        if any(rest.strip(b"\0")):
            what = "more data after the end-of-archive marker (tars joined by cat?): write it again"
            raise ShardError(path, what, key, end)


def load_index(path: Path, content: bool = False) -> ShardIndex:
    """The stored index of a shard if it still holds, else a new one, which is stored.

    content: with the checksum of the whole tar, which is also made where an index that no longer
    holds had one.
    """
    stat = path.stat()
    places = [path.with_name(path.name + ".index.jsonl"), _cache_file(path)]
    for place in places:
        index = read_index(place)
        holds = index and (index.size, index.mtime_ns) == (stat.st_size, stat.st_mtime_ns)
        if index and holds and (index.content or not content):
            return index
        content = content or bool(index and index.content)
    index = build_index(path, content)
    stored = spell(index)
    if not any(store(place, stored) for place in places):
        log.debug("index of %s could not be stored: it will be built again", path)
    return index


def store(place: Path, data: bytes) -> bool:
    # Not the process's number: another machine that writes here may have one with the same.
    temporary = place.with_name(f"{place.name}.{uuid.uuid4().hex[:12]}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, place)  # ranks may do this at once, each with the same content
        return True
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        return False


def spell(index: ShardIndex) -> bytes:
    """As it is stored: a line that describes it, and the table."""
    head = {"version": INDEX_VERSION, "table": sha256(index.table)}
    head |= {"size": index.size, "mtime_ns": index.mtime_ns, "count": index.count, "content": index.content}
    return json.dumps(head).encode() + b"\n" + index.table


def _cache_file(path: Path) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    name = sha256(os.path.realpath(path).encode(errors="surrogateescape"))
    return root / "flamingo" / "index" / f"{name}.jsonl"


def read_index(place: Path) -> ShardIndex | None:
    """The index stored there; None if there is none, or it is not ours, or damaged."""
    try:
        return parse_index(place.read_bytes())
    except OSError:
        return None


def parse_index(stored: bytes) -> ShardIndex | None:
    """What `spell` wrote; None if it is something else, or damaged."""
    try:
        first, _, table = stored.partition(b"\n")
        head = json.loads(first)
        if head["version"] == INDEX_VERSION and head["table"] == sha256(table):
            size, mtime, count = (int(head[name]) for name in ("size", "mtime_ns", "count"))
            return ShardIndex(size, mtime, count, table, str(head.get("content", "")))
    except (ValueError, TypeError, KeyError):
        pass
    return None

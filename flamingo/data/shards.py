"""Index of plain WebDataset tars, and random access to their samples.

A shard is an ordinary, uncompressed tar. Members KEY.EXT that share KEY and follow each other form
a sample; EXT is all that follows the first dot of the base name, in lower case. The headers of a
shard are read once, checked to the last byte (webdataset itself stops silently at a damaged
header), and kept beside the shard, or in the user's cache folder if that is read-only.
Nothing here runs a command, unpickles, or turns a name from a tar into a path.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

import numpy as np
from braceexpand import braceexpand

from flamingo.data.errors import BadSample, ShardError

log = logging.getLogger(__name__)

INDEX_VERSION = 1
BLOCK = 512  # tar works in blocks of so many bytes
_NAME = re.compile(r"(?!__[^/]*__/)((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)  # webdataset's rule

Sample = tuple[str, dict[str, tuple[int, int]]]  # key, member -> (offset, size), in bytes
V = TypeVar("V")


class Recent(Generic[V]):
    """Values made on demand, of which the `size` most recently used are kept."""

    def __init__(self, size: int, make: Callable[[int], V]) -> None:
        self.size, self.make = size, make
        self.values: OrderedDict[int, V] = OrderedDict()

    def __getitem__(self, key: int) -> V:
        if key in self.values:
            self.values.move_to_end(key)
        else:
            self.values[key] = self.make(key)
            if len(self.values) > self.size:
                self.values.popitem(last=False)
        return self.values[key]

    def __reduce__(self) -> tuple[Any, ...]:
        return Recent, (self.size, self.make)  # another process makes its own values


def expand(patterns: str | Sequence[str]) -> list[Path]:
    """Paths, globs and ranges -> existing tar files, in the order given (globs sorted).

    Raises:
        ValueError: nothing given, nothing found, a file given twice, or a remote address.
    """
    listed = [patterns] if isinstance(patterns, str) else list(patterns)
    if not any(listed):
        raise ValueError("`shards` is empty: name at least one tar, as in data/pairs-{000..003}.tar")
    paths = [path for pattern in listed for path in _expand_one(pattern)]
    seen: set[str] = set()
    for path in paths:
        real = os.path.realpath(path)
        if real in seen:
            raise ValueError(f"`shards` names {path} twice: its samples would count double")
        seen.add(real)
    return paths


def _expand_one(pattern: str) -> Iterator[Path]:
    if "://" in pattern or pattern.startswith("pipe:"):
        raise ValueError(f"`shards` names {pattern!r}, but only local files can be read: copy it first")
    try:
        names = braceexpand(os.path.expanduser(pattern))
    except ValueError as error:
        raise ValueError(f"`shards` names {pattern!r}: {error}") from error
    for name in names:
        if os.path.isfile(name):
            yield Path(name)
        elif os.path.isdir(name):
            raise ValueError(f"`shards` names the folder {name}: write {name.rstrip('/')}/*.tar")
        elif not glob.has_magic(name):
            raise ValueError(f"`shards` names {name}, which is not there (from {pattern!r})")
        else:
            found = sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path))
            if not found:
                raise ValueError(f"`shards` names {name!r}, which matches no file")
            yield from map(Path, found)


@dataclass(frozen=True)
class ShardIndex:
    """Where each sample of a shard lies.

    Attributes:
        size, mtime_ns: of the tar; they tell whether the index still holds.
        count: samples.
        table: JSON of `samples()`. Kept as bytes: most shards are only counted.
    """

    size: int
    mtime_ns: int
    count: int
    table: bytes

    def samples(self) -> list[Sample]:
        """Key and members of every sample, in the order of the tar."""
        return json.loads(self.table)

    def digest(self, name: str) -> str:
        """SHA-256 over name, size and member table (not the time: a copy is the same shard)."""
        return _sha256(f"{name}\n{self.size}\n".encode(errors="surrogateescape") + self.table)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def build_index(path: Path) -> ShardIndex:
    """Read all tar headers of a shard.

    Raises:
        ShardError: truncated, damaged, compressed, a link or sparse member, or one key twice.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    key: str | None = None
    end = 0  # of the last sound member, for the message
    with open(path, "rb") as file:
        stat = os.fstat(file.fileno())
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for info in tar:
                    if info.size < 0:  # would send the loop back to the start
                        raise tarfile.TarError("negative size")
                    end = info.offset_data + info.size
                    if end > stat.st_size:
                        what = f"truncated: {info.name} ends at byte {end}, the file at {stat.st_size}"
                        raise ShardError(path, what, _split(info)[0] or key, info.offset_data)
                    key = _add(path, info, samples, key)
                end = tar.offset
        except ShardError:
            raise
        except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
            hint = "" if samples else " (shards must be plain tars: unpack .tar.gz and the like)"
            raise ShardError(path, f"not a sound tar: {error}{hint}", key, end) from error
        _check_end(file, path, end, key)
    table = json.dumps(list(samples.items()), separators=(",", ":")).encode()
    return ShardIndex(stat.st_size, stat.st_mtime_ns, len(samples), table)


def _split(info: tarfile.TarInfo) -> tuple[str, str] | tuple[None, None]:
    match = _NAME.fullmatch(info.name)
    return (match[1], match[2].lower()) if match else (None, None)


def _add(
    path: Path,
    info: tarfile.TarInfo,
    samples: dict[str, dict[str, tuple[int, int]]],
    current: str | None,
) -> str | None:
    """Enter one member into `samples`; return the key of the sample that is being read."""
    key, extension = _split(info)
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


def load_index(path: Path) -> ShardIndex:
    """The stored index of a shard if it still holds, else a new one, which is stored."""
    stat = path.stat()
    places = [path.with_name(path.name + ".index.jsonl"), _cache_file(path)]
    for place in places:
        index = _read_index(place)
        if index and (index.size, index.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
            return index
    index = build_index(path)
    head = {"version": INDEX_VERSION, "table": _sha256(index.table)}
    head |= {"size": index.size, "mtime_ns": index.mtime_ns, "count": index.count}
    stored = json.dumps(head).encode() + b"\n" + index.table
    if not any(_store(place, stored) for place in places):
        log.debug("index of %s could not be stored: it will be built again", path)
    return index


def _store(place: Path, data: bytes) -> bool:
    temporary = place.with_name(f"{place.name}.{os.getpid()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, place)  # ranks may do this at once, each with the same content
        return True
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        return False


def _cache_file(path: Path) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    name = _sha256(os.path.realpath(path).encode(errors="surrogateescape"))
    return root / "flamingo" / "index" / f"{name}.jsonl"


def _read_index(place: Path) -> ShardIndex | None:
    """The index stored there; None if there is none, or it is not ours, or damaged."""
    try:
        first, _, table = place.read_bytes().partition(b"\n")
        head = json.loads(first)
        if head["version"] == INDEX_VERSION and head["table"] == _sha256(table):
            return ShardIndex(int(head["size"]), int(head["mtime_ns"]), int(head["count"]), table)
    except (OSError, ValueError, TypeError, KeyError):
        pass
    return None


class _Open:
    """A shard that is being read: its index and its file descriptor."""

    def __init__(self, path: Path, index: ShardIndex) -> None:
        self.samples = index.samples()
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class ShardSet:
    """Local shards as one table of samples that can be read in any order.

    Attributes:
        paths, names: of the shards; a name is the path from their common folder.
        counts: int64[shards], samples in each.
        manifest: digest of names, sizes and member tables; another one means other data.

    Args:
        patterns: see `expand`.
        keep: how many shards stay open at most, each with its index in memory.
    """

    def __init__(self, patterns: str | Sequence[str], keep: int = 32) -> None:
        self.paths = expand(patterns)
        common = os.path.commonpath([os.path.abspath(path.parent) for path in self.paths])
        self.names = [os.path.relpath(path, common).replace(os.sep, "/") for path in self.paths]
        self._open: Recent[_Open] = Recent(keep, self._open_shard)
        indexes = (load_index(path) for path in self.paths)
        pairs = [(i.count, i.digest(name)) for i, name in zip(indexes, self.names, strict=True)]
        self.counts = np.array([count for count, _ in pairs], dtype=np.int64)
        self.digests = [digest for _, digest in pairs]
        self.manifest = _sha256("\n".join(self.digests).encode())
        if not self.counts.any():
            raise ValueError(f"`shards` ({patterns}) hold no sample: their tars are empty")

    def keys(self) -> Iterator[list[str]]:
        """The sample keys of each shard, in order."""
        for path in self.paths:
            yield [key for key, _ in load_index(path).samples()]

    def key(self, shard: int, sample: int) -> str:
        """Numbers of a shard and of a sample in it -> the sample's key."""
        return self._open[shard].samples[sample][0]

    def read(self, shard: int, sample: int, largest: int | None = None) -> dict[str, bytes]:
        """Numbers of a shard and of a sample in it -> member extension -> bytes.

        Raises:
            ShardError: the file is no longer what was indexed.
            BadSample: its members take more than `largest` bytes together.
        """
        opened = self._open[shard]
        key, members = opened.samples[sample]
        start = min(offset for offset, _ in members.values())
        stop = max(offset + size for offset, size in members.values())
        if largest is not None and stop - start > largest:
            raise BadSample("too large sample", f"{stop - start} bytes, max_sample_mb allows {largest}")
        block = os.pread(opened.descriptor, stop - start, start)  # one call: members are adjacent
        if len(block) != stop - start:
            raise ShardError(self.paths[shard], "the file became shorter while in use", key, start)
        return {
            name: block[offset - start : offset - start + size] for name, (offset, size) in members.items()
        }

    def _open_shard(self, shard: int) -> _Open:
        index = load_index(self.paths[shard])
        if index.digest(self.names[shard]) != self.digests[shard]:
            what = "the shard was altered while in use, so the order of samples no longer holds"
            raise ShardError(self.paths[shard], what)
        return _Open(self.paths[shard], index)

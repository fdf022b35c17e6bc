"""A bounded folder of fetched files, shared by all processes of a node.

A file is fetched once, by whoever asks first; the others wait for it. The least recently opened
ones make room. One that is open is never removed: whoever reads it holds a shared lock on it.
Names are digests of addresses, so nothing from outside becomes a path.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from flamingo.data.errors import ShardError
from flamingo.data.remote import Info, Remote, fetch

ADVICE = "set cache_dir or cache_gb of the source's `remote`, or the variable FLAMINGO_CACHE"


class ShardCache:
    """`open(address)` -> a file descriptor of the fetched file.

    Raises:
        ValueError: the folder cannot be written.
    """

    def __init__(self, remote: Remote) -> None:
        root = remote.cache_dir or os.environ.get("FLAMINGO_CACHE") or "~/.cache/flamingo"
        self.remote, self.folder = remote, Path(root).expanduser() / "shards"
        self.limit = int(remote.cache_gb * 2**30)
        try:
            (self.folder / "locks").mkdir(parents=True, exist_ok=True)
            probe = self.folder / "locks" / f"probe.{os.getpid()}"
            probe.touch()
            probe.unlink(missing_ok=True)  # another machine's process may have this number
        except OSError as error:
            raise ValueError(
                f"the cache folder {self.folder} cannot be written ({error}): {ADVICE}"
            ) from None

    def open(self, address: str, info: Info, sha256: str | None = None) -> int:
        """A descriptor for reading; as long as it is open, the file stays.

        sha256: of the content, if it is known.

        Raises:
            ShardError: it cannot be fetched, or is not what it should be.
            ValueError: there is no room.
        """
        entry = self._entry(address, info)
        while True:
            descriptor = _pinned(entry)
            if descriptor is not None:
                return descriptor
            self._fetch(address, info, entry, sha256, spare=None)

    def prefetch(self, address: str, info: Info, sha256: str | None, spare: Collection[Path]) -> None:
        """Fetch it if there is room for it beside what is open and the entries to spare."""
        entry = self._entry(address, info)
        if not entry.exists():
            self._fetch(address, info, entry, sha256, spare)

    def entry(self, address: str, info: Info) -> Path:
        """The file that the content of an address has here."""
        return self._entry(address, info)

    def _entry(self, address: str, info: Info) -> Path:
        name = hashlib.sha256(f"{address}\n{info.size}\n{info.tag}".encode(errors="surrogateescape"))
        return self.folder / f"{name.hexdigest()}.tar"

    def _fetch(
        self, address: str, info: Info, entry: Path, sha256: str | None, spare: Collection[Path] | None
    ) -> None:
        lock = FileLock(self.folder / "locks" / f"{entry.stem}.lock")
        try:
            lock.acquire(blocking=spare is None)  # a prefetch leaves it to whoever is at it
        except Timeout:
            return
        try:
            if not entry.exists():
                self._write(address, info, entry, sha256, spare)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise ValueError(f"the cache folder {self.folder} is full ({error}): {ADVICE}") from None
            raise
        finally:
            lock.release()

    def _write(
        self, address: str, info: Info, entry: Path, sha256: str | None, spare: Collection[Path] | None
    ) -> None:
        """The file under its name, complete, or not at all."""
        part = entry.with_suffix(f".{os.getpid()}.part")
        try:
            file = self._reserve(part, info.size, spare)
            if file is None:
                return
            with file:
                fetch(address, info, file, self.remote)
                file.flush()
                _check(address, file, info, sha256)
                os.fsync(file.fileno())
                os.replace(part, entry)
        finally:
            part.unlink(missing_ok=True)

    def _reserve(self, part: Path, size: int, spare: Collection[Path] | None) -> BinaryIO | None:
        """An empty file for `size` bytes, which are counted from now on; None: no room for a prefetch."""
        if size > self.limit:
            raise ValueError(
                f"a shard of {_gib(size)} does not fit into cache_gb={self.remote.cache_gb:g}: {ADVICE}"
            )
        deadline = time.monotonic() + self.remote.timeout
        while True:
            with FileLock(self.folder / "locks" / "room.lock"):
                used = self._make_room(size, spare or ())
                if used + size <= self.limit:
                    file = open(part, "w+b")  # noqa: SIM115 - the caller closes it
                    fcntl.flock(file, fcntl.LOCK_EX)  # tells the living from what a killed process left
                    file.truncate(size)
                    return file
            if spare is not None:
                return None
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{_gib(used)} of the cache {self.folder} are in use, {_gib(size)} more are "
                    f"needed, cache_gb={self.remote.cache_gb:g} allows no more: raise it, or lower `window`"
                )
            time.sleep(0.1)

    def _make_room(self, size: int, spare: Collection[Path]) -> int:
        """Remove what was opened longest ago until `size` bytes fit; the bytes that are left in use."""
        held: list[tuple[float, int, Path]] = []
        for path in [*self.folder.glob("*.tar"), *self.folder.glob("*.part")]:
            with suppress(FileNotFoundError):
                stat = path.stat()
                held.append((stat.st_mtime, stat.st_size, path))
        used = sum(size for _, size, _ in held)
        for _, bytes_, path in sorted(held):
            if used + size <= self.limit:
                break
            if path not in spare and _remove(path):
                used -= bytes_
        return used


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"


def _pinned(entry: Path) -> int | None:
    """A descriptor that holds a shared lock; None: it is not there."""
    try:
        descriptor = os.open(entry, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if os.fstat(descriptor).st_nlink:  # else it was removed in between
            with suppress(OSError):
                os.utime(entry)
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _remove(path: Path) -> bool:
    """Whether it is gone: it stays while somebody reads or writes it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


def _check(address: str, file: BinaryIO, info: Info, sha256: str | None) -> None:
    """Compare the content with every checksum that is known."""
    for wanted in filter(None, (f"sha256:{sha256}" if sha256 else "", info.digest)):
        name, _, expected = wanted.partition(":")
        file.seek(0)
        found = _digest(file, name)
        if found != expected:
            raise ShardError(address, f"its {name} is {found}, it should be {expected}")


def _digest(file: BinaryIO, name: str) -> str:
    digest = hashlib.new(name, usedforsecurity=False)
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()

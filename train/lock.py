"""A run folder belongs to one live run: rank 0 holds an exclusive lock on RUN/lock.

The kernel releases it when the process ends, however that is, so no stale lock is ever left. On
NFS the lock holds between machines too (unless mounted with `nolock`). Where a file system knows
no locks (Lustre without `-o flock`), a holder that lives on this machine is still found by its
process id; another machine's is not, and a warning says so.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
import warnings
from pathlib import Path
from types import TracebackType

NAME = "lock"
RETRY_SECONDS = 0.5
UNSUPPORTED = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
TAKEN = {errno.EWOULDBLOCK, errno.EACCES}


class RunLock:
    """Held from `acquire` to `release` or the end of the process; a context manager."""

    def __init__(self, run: Path) -> None:
        self.path = run / NAME
        self._file = -1
        # A forked loader process would go on holding the lock after its rank was killed.
        os.register_at_fork(after_in_child=self._close)

    def acquire(self, wait: float = 0.0) -> None:
        """Take the folder, making it if need be.

        Args:
            wait: seconds to wait for a holder that is about to end: after a restart.

        Raises:
            ValueError: a live run has it; says where that runs.
            OSError: the folder cannot be written.
        """
        until = time.monotonic() + wait
        while not self._try():
            if time.monotonic() >= until:
                raise ValueError(
                    f"{self.path.parent} is in use by a live run ({self._holder()}): wait for it, end it "
                    f"(touch {self.path.parent / 'stop'}), or choose another folder with run=FOLDER"
                )
            time.sleep(RETRY_SECONDS)

    def release(self) -> None:
        """Give the folder back; the lock's file goes, and so does a folder with nothing else in it."""
        if self._file < 0:
            return
        self.path.unlink(missing_ok=True)  # before the lock is let go: nobody else's file is taken away
        self._close()
        if not any(self.path.parent.iterdir()):
            self.path.parent.rmdir()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _try(self) -> bool:
        if self._file >= 0:
            return True
        folder = self.path.parent
        if file := next((place for place in (folder, *folder.parents) if place.is_file()), None):
            raise ValueError(f"run={folder}: {file} is a file, not a folder: choose another with run=FOLDER")
        folder.mkdir(parents=True, exist_ok=True)
        # Not O_TRUNC: until the lock is ours, the words in it are the holder's.
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in TAKEN:
                    return False
                if error.errno not in UNSUPPORTED:
                    raise
                if self._lives_here():
                    return False
                warnings.warn(
                    f"{self.path.parent}: its file system knows no locks ({error.strerror}), so nothing "
                    "keeps two machines from training into it at once",
                    stacklevel=2,
                )
            if not self._is_there(file):  # the holder before gave it back between our two calls
                return False
            os.ftruncate(file, 0)
            os.pwrite(file, json.dumps(_me()).encode() + b"\n", 0)
            self._file, file = file, -1
            return True
        finally:
            if file >= 0:
                os.close(file)

    def _is_there(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _holder(self) -> str:
        held = _read(self.path)
        return f"host {held['host']}, process {held['pid']}, since {held['since']}" if held else "unknown"

    def _lives_here(self) -> bool:
        held = _read(self.path)
        if not held or held["host"] != socket.gethostname():
            return False
        try:
            os.kill(int(held["pid"]), 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return int(held["pid"]) != os.getpid()

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _me() -> dict[str, str | int]:
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": since}


def _read(path: Path) -> dict[str, str | int] | None:
    try:
        held = json.loads(path.read_text())
        return held if {"host", "pid", "since"} <= held.keys() else None
    except (OSError, ValueError, AttributeError):
        return None

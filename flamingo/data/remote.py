"""Shards in stores: what they are, and their bytes, in spite of stalls, resets and server errors.

https through requests; s3, gs and hf through fsspec. An address is read in one direction and taken
up again where it broke off. What cannot get better is not tried again: not there, not allowed.
"""

from __future__ import annotations

import concurrent.futures
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeVar
from urllib.parse import urljoin

from pydantic import BaseModel, ConfigDict, Field

from flamingo.data.errors import ShardError
from flamingo.data.places import check_address

BLOCK = 1 << 20  # bytes that are read at a time
STRETCH = 16 << 20  # bytes of one request to an object store
REDIRECTS = 5
LONGEST_PAUSE = 30.0  # seconds
V = TypeVar("V")


class Remote(BaseModel):
    """How shards of a source that lie in a store are fetched."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cache_dir: str | None = Field(
        default=None, description="Folder for fetched shards. Default: FLAMINGO_CACHE, ~/.cache/flamingo."
    )
    cache_gb: float = Field(
        default=100.0, gt=0, description="That it may take: at least two windows of shards."
    )
    threads: int = Field(default=4, ge=1, description="Shards that a process fetches at a time.")
    attempts: int = Field(default=8, ge=1, description="Tries in a row without a byte before a shard fails.")
    backoff: float = Field(default=0.5, ge=0, description="Seconds before the second try; doubles.")
    timeout: float = Field(default=60.0, gt=0, description="Seconds without a byte that are a failed try.")
    allow_http: bool = Field(default=False, description="Plain http:// to other machines.")


class Info(NamedTuple):
    """size in bytes; tag: another one means other content; digest: "sha256:..." or "md5:..." or ""."""

    size: int
    tag: str
    digest: str = ""


class Gone(Exception):
    """Trying again would not help."""


class Passing(Exception):
    """It may work the next time."""


class Page(Passing):
    """A web page where a file should be: a proxy's, or a login's."""


class Background:
    """Calls that a few threads run. Unlike those of ThreadPoolExecutor they do not keep a process
    alive that wants to end: what they fetch is only of use to it."""

    def __init__(self, threads: int) -> None:
        self._calls: queue.SimpleQueue[tuple[concurrent.futures.Future[Any], Callable[[], Any]]]
        self._calls, self._threads, self._started = queue.SimpleQueue(), threads, 0

    def submit(self, call: Callable[[], V]) -> concurrent.futures.Future[V]:
        future: concurrent.futures.Future[V] = concurrent.futures.Future()
        self._calls.put((future, call))
        if self._started < self._threads:
            self._started += 1
            threading.Thread(target=self._work, daemon=True).start()
        return future

    def _work(self) -> None:
        while True:
            future, call = self._calls.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:
                    future.set_exception(error)
            del future, call  # a waiting thread should not hold the last result


class Store(Protocol):
    def info(self, address: str) -> Info: ...

    def blocks(self, address: str, start: int, info: Info) -> Iterator[bytes]:
        """The bytes from `start` on."""
        ...


# A forked process must not share its parent's connections, so the process is a part of the key.
_stores: dict[tuple[int, str, str], Store] = {}


def store_of(address: str, remote: Remote) -> Store:
    """The store that an address belongs to; one per process.

    Raises:
        ValueError: an address that may not be opened, or a package for it is not installed.
    """
    scheme = check_address(address, remote.allow_http).partition(":")[0].lower()
    key = (os.getpid(), scheme, remote.model_dump_json())
    if key not in _stores:
        _stores[key] = WebStore(remote) if scheme in ("http", "https") else ObjectStore(scheme, remote)
    return _stores[key]


def info_of(address: str, remote: Remote) -> Info:
    """Size and tag of what lies there.

    Raises:
        ShardError: it is not there, or the store did not answer in `attempts` tries.
    """
    return patiently(lambda: store_of(address, remote).info(address), address, remote)


def fetch(address: str, info: Info, file: BinaryIO, remote: Remote) -> None:
    """Write the bytes of an address into a file, from its start.

    Raises:
        ShardError: `attempts` tries in a row brought no byte, or it is not what `info` says.
        OSError: the file cannot be written.
    """
    position, tries, reason = 0, 0, ""  # tries: in a row, without a byte
    while position < info.size:
        before = position
        try:
            for block in store_of(address, remote).blocks(address, position, info):
                if not position and _is_page(block):
                    raise Page(f"a web page in place of a tar: {block[:60]!r}")
                if position + len(block) > info.size:
                    raise Gone(f"more than the {info.size} bytes that the store announced")
                file.write(block)
                position += len(block)
            reason = f"the store stopped at byte {position} of {info.size}"
        except Gone as error:
            raise ShardError(address, str(error), offset=position) from error
        except Passing as error:
            reason = str(error)
        if position < info.size:
            tries = 0 if position > before else tries + 1
            if tries >= remote.attempts:
                raise ShardError(address, f"gave up after {tries} tries: {reason}", offset=position)
            _pause(max(1, tries), remote)


def read_small(address: str, remote: Remote, largest: int) -> bytes | None:
    """A whole small file; None: it is not there, or larger than `largest`."""
    store = store_of(address, remote)

    def read() -> bytes | None:
        try:
            info = store.info(address)
        except (Gone, Page):
            return None
        return b"".join(store.blocks(address, 0, info)) if info.size <= largest else None

    try:
        return patiently(read, address, remote)
    except ShardError:
        return None


def patiently(call: Callable[[], V], address: str, remote: Remote) -> V:
    """What `call` returns, at last.

    Raises:
        ShardError: after `attempts` tries, or at once if it cannot get better.
    """
    for number in range(1, remote.attempts + 1):
        try:
            return call()
        except Gone as error:
            raise ShardError(address, str(error)) from error
        except Passing as error:
            if number == remote.attempts:
                raise ShardError(address, f"gave up after {number} tries: {error}") from error
            _pause(number, remote)
    raise AssertionError("unreachable")


def _pause(tries: int, remote: Remote) -> None:
    # Jitter: the ranks of a cluster should not come back all at once.
    time.sleep(min(LONGEST_PAUSE, remote.backoff * 2 ** (tries - 1)) * random.uniform(0.5, 1.5))  # noqa: S311


def _is_page(block: bytes) -> bool:
    return block[:512].lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml"))


class WebStore:
    """http and https. Redirects are followed to allowed addresses only, never from https to http."""

    def __init__(self, remote: Remote) -> None:
        import requests

        self.remote, self.session = remote, requests.Session()

    def info(self, address: str) -> Info:
        with self._ask("HEAD", address, {}) as answer:
            size = answer.headers.get("Content-Length")
            if size is not None and answer.status_code == 200:
                return Info(int(size), _tag(answer.headers))
        with self._ask("GET", address, {"Range": "bytes=0-0"}) as answer:  # a server without HEAD
            total = answer.headers.get("Content-Range", "").rpartition("/")[2]
            total = total if answer.status_code == 206 else answer.headers.get("Content-Length", "")
            if not total.isdigit():
                raise Gone("the server does not say how long the file is")
            return Info(int(total), _tag(answer.headers))

    def blocks(self, address: str, start: int, info: Info) -> Iterator[bytes]:
        from urllib3.exceptions import HTTPError

        headers = {"Range": f"bytes={start}-"} if start else {}
        with self._ask("GET", address, headers) as answer:
            if _tag(answer.headers) != info.tag:
                raise Gone("the file was replaced while it was read")
            told = answer.headers.get("Content-Range", f"bytes {start}-")
            if answer.status_code == 206 and not told.startswith(f"bytes {start}-"):
                raise Gone(f"asked for the bytes from {start} on, the server sent {told}")
            skip = start if answer.status_code == 200 else 0  # a server that ignores Range
            try:
                # As it arrives: what was still waiting to fill a block would be lost in a break.
                while block := answer.raw.read1(BLOCK):
                    if skip < len(block):
                        yield block[skip:] if skip else block
                    skip = max(0, skip - len(block))
            except (HTTPError, OSError) as error:
                raise Passing(f"{type(error).__name__}: {error}") from error

    def _ask(self, method: str, address: str, headers: Mapping[str, str]) -> Any:
        """The last answer of a chain of redirects, its body not yet read."""
        import requests

        timeout = (min(self.remote.timeout, 20.0), self.remote.timeout)
        wanted = {"Accept-Encoding": "identity", **headers}
        for _ in range(REDIRECTS):
            try:
                answer = self.session.request(
                    method, address, headers=wanted, stream=True, timeout=timeout, allow_redirects=False
                )
            except requests.exceptions.SSLError as error:
                raise Gone(f"{error}") from error
            except requests.RequestException as error:
                raise Passing(f"{type(error).__name__}: {error}") from error
            if not answer.is_redirect:
                return _judged(answer, method)
            target = urljoin(address, answer.headers["Location"])
            answer.close()
            if address.startswith("https:") and not target.startswith("https:"):
                raise Gone(f"redirected from https to {target}")
            try:
                address = check_address(target, self.remote.allow_http)
            except ValueError:
                raise Gone(f"redirected to {target}, which is not allowed") from None
        raise Gone(f"more than {REDIRECTS} redirects")


def _judged(answer: Any, method: str) -> Any:
    status = answer.status_code
    if status in (200, 206) and answer.headers.get("Content-Type", "").startswith("text/html"):
        answer.close()
        raise Page("a web page in place of a file")
    if status in (200, 206) or (method == "HEAD" and status in (405, 501)):
        return answer
    answer.close()
    if status in (408, 425, 429) or status >= 500:
        raise Passing(f"status {status}")
    raise Gone(f"status {status} {answer.reason}")


def _tag(headers: Mapping[str, str]) -> str:
    return headers.get("ETag") or headers.get("Last-Modified") or ""


class ObjectStore:
    """s3, gs and hf, as fsspec opens them, with the credentials that their libraries find."""

    def __init__(self, scheme: str, remote: Remote) -> None:
        import fsspec

        self.remote = remote
        # A stalled request keeps its thread; another one goes on with the next try.
        self.pool = Background(4 * remote.threads)
        try:
            self.system = fsspec.filesystem(scheme, **_options(scheme, remote))
        except ImportError as error:
            raise ValueError(
                f"{scheme}:// needs a package: pip install 'flamingo-vlm[remote]' ({error})"
            ) from None

    def info(self, address: str) -> Info:
        self.system.invalidate_cache()
        told = self._do(lambda: self.system.info(address))
        if told.get("type") != "file" or told.get("size") is None:
            raise Gone("is not a file")
        return Info(int(told["size"]), _object_tag(told), _object_digest(told))

    def blocks(self, address: str, start: int, info: Info) -> Iterator[bytes]:
        for begin in range(start, info.size, STRETCH):
            end = min(begin + STRETCH, info.size)
            block = self._do(lambda begin=begin, end=end: self.system.cat_file(address, start=begin, end=end))
            if len(block) != end - begin:
                raise Passing(f"{len(block)} bytes where {end - begin} were asked for")
            yield block

    def glob(self, pattern: str) -> list[str]:
        return [self.system.unstrip_protocol(path) for path in self._do(lambda: self.system.glob(pattern))]

    def _do(self, call: Callable[[], Any]) -> Any:
        try:
            return self.pool.submit(call).result(self.remote.timeout)
        except FileNotFoundError as error:
            raise Gone(f"not there: {error}") from error
        except PermissionError as error:
            raise Gone(f"not allowed: {error}") from error
        except concurrent.futures.TimeoutError as error:
            raise Passing(f"no answer in {self.remote.timeout:g} seconds") from error
        except Exception as error:  # every library has its own
            if type(error).__name__ in ("NoCredentialsError", "RepositoryNotFoundError", "GatedRepoError"):
                raise Gone(f"{type(error).__name__}: {error}") from error
            raise Passing(f"{type(error).__name__}: {error}") from error


def _options(scheme: str, remote: Remote) -> dict[str, Any]:
    if scheme == "s3":  # retries are ours: theirs know nothing of the byte that we are at
        config = {"connect_timeout": remote.timeout, "read_timeout": remote.timeout}
        return {"config_kwargs": {**config, "retries": {"max_attempts": 1}}, "use_listings_cache": False}
    return {}


def _object_tag(told: Mapping[str, Any]) -> str:
    for name in ("ETag", "etag", "blob_id", "generation", "LastModified", "mtime"):
        if told.get(name):
            return str(told[name])
    return ""


def _object_digest(told: Mapping[str, Any]) -> str:
    """A checksum that is one: an S3 ETag is the MD5 of some objects only."""
    if told.get("md5Hash"):  # Google: base64
        import base64

        return f"md5:{base64.b64decode(told['md5Hash']).hex()}"
    large = told.get("lfs")
    sha256 = large.get("sha256") if isinstance(large, Mapping) else getattr(large, "sha256", None)
    return f"sha256:{sha256}" if sha256 else ""

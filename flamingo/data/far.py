"""The shards of one source that lie in stores: their indexes, their files, and fetching ahead."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from flamingo.data.cache import ShardCache
from flamingo.data.errors import ShardError
from flamingo.data.index import ShardIndex, build_index, parse_index, read_index, spell, store
from flamingo.data.remote import (
    Background,
    Info,
    ObjectStore,
    Remote,
    info_of,
    patiently,
    read_small,
    store_of,
)

log = logging.getLogger(__name__)

CARD = "dataset.json"
LARGEST = 256 << 20  # bytes of an index or a card that is fetched
AT_ONCE = 16  # questions to a store
V = TypeVar("V")


def listed(pattern: str, remote: Remote) -> list[str]:
    """The addresses that a glob means."""
    held = store_of(pattern, remote)
    assert isinstance(held, ObjectStore)
    return patiently(lambda: held.glob(pattern), pattern, remote)


class Far:
    """Remote shards. Pickles; every process opens its own connections.

    An index comes from the cache, else from ADDRESS.index.jsonl (`flamingo data index` writes it
    beside a shard: upload it too), else from the shard itself, which is fetched once for that.

    Raises:
        ShardError: a shard is not there, or cannot be trusted.
        ValueError: the cache folder cannot be written.
    """

    def __init__(self, addresses: Sequence[str], remote: Remote) -> None:
        self.remote, self.cache = remote, ShardCache(remote)
        self._cards: dict[str, dict[str, Any]] = {}
        self._background: tuple[int, Background] | None = None
        infos = _at_once(lambda address: info_of(address, remote), addresses)
        self.infos: dict[str, Info] = dict(zip(addresses, infos, strict=True))
        unknown = [address for address in addresses if self._held(address) is None]
        found = _at_once(self._published, unknown)
        if missing := [a for a, known in zip(unknown, found, strict=True) if not known]:
            log.warning(
                "%d of %d shards have no index beside them: each is fetched once now to make it",
                len(missing),
                len(addresses),
            )
            _at_once(self._build, missing, remote.threads, "indexing")

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_background": None}

    def index(self, address: str) -> ShardIndex:
        """The index that the constructor left in the cache; made again if somebody deleted it."""
        found = self._held(address)
        if found is None:
            if not self._published(address):
                self._build(address)
            found = self._held(address)
        if found is None:
            raise ShardError(address, f"its index cannot be kept in {self.cache.folder}: is the disk full?")
        return found

    def open(self, address: str) -> int:
        """A descriptor of the fetched shard."""
        return self.cache.open(address, self.infos[address], self._sha256(address))

    def prefetch(self, now: Sequence[str], soon: Sequence[str]) -> None:
        """Fetch in the background what is being read, then what comes next, if there is room.

        What fails here is tried again, and told, when it is needed.
        """
        if self._background is None or self._background[0] != os.getpid():  # threads do not survive a fork
            self._background = (os.getpid(), Background(self.remote.threads))
        spare = frozenset(self.cache.entry(a, self.infos[a]) for a in (*now, *soon))
        for address in (*now, *soon):
            self._background[1].submit(partial(self._quietly, address, spare))

    def _quietly(self, address: str, spare: frozenset[Path]) -> None:
        try:
            self.cache.prefetch(address, self.infos[address], self._sha256(address), spare)
        except (ValueError, OSError) as error:
            log.debug("prefetching %s: %s", address, error)

    def _place(self, address: str) -> Path:
        return self.cache.folder / "indexes" / f"{self.cache.entry(address, self.infos[address]).stem}.jsonl"

    def _held(self, address: str) -> ShardIndex | None:
        index = read_index(self._place(address))
        return index if index and index.size == self.infos[address].size else None

    def _published(self, address: str) -> bool:
        """Take over the index that lies beside the shard; not one of another file, or a wrong one."""
        stored = read_small(f"{address}.index.jsonl", self.remote, LARGEST)
        index = parse_index(stored) if stored else None
        if index is None or index.size != self.infos[address].size:
            return False
        try:
            index.checked()
        except ValueError as error:
            log.warning("%s.index.jsonl: %s", address, error)
            return False
        return self._keep(address, index)

    def _build(self, address: str) -> bool:
        descriptor = self.open(address)
        try:
            index = build_index(Path(f"/proc/self/fd/{descriptor}"))
        except ShardError as error:
            raise ShardError(address, error.what, error.key, error.offset) from None
        finally:
            os.close(descriptor)
        return self._keep(address, index)

    def _keep(self, address: str, index: ShardIndex) -> bool:
        return store(self._place(address), spell(replace(index, mtime_ns=0)))

    def _sha256(self, address: str) -> str | None:
        """What a dataset.json beside the shard says of it."""
        folder, _, name = address.rpartition("/")
        if folder not in self._cards:
            held = read_small(f"{folder}/{CARD}", self.remote, LARGEST)
            try:
                self._cards[folder] = dict(json.loads(held)["files"]) if held else {}
            except (ValueError, KeyError, TypeError):
                self._cards[folder] = {}
        said = self._cards[folder].get(name)
        found = said.get("sha256") if isinstance(said, dict) else None
        return found if isinstance(found, str) else None


def _at_once(
    call: Callable[[str], V], addresses: Sequence[str], threads: int = AT_ONCE, what: str | None = None
) -> list[V]:
    """Results in order; the first error ends it."""
    if not addresses:
        return []
    with ThreadPoolExecutor(threads) as pool:
        futures: Iterable[Future[V]] = [pool.submit(call, address) for address in addresses]
        if what:
            from tqdm import tqdm

            futures = tqdm(futures, what, unit="shard", disable=not sys.stderr.isatty())
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise

"""Random access to the samples of many shards, on disk or in a store."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from flamingo.data.errors import BadSample, ShardError
from flamingo.data.far import Far, listed
from flamingo.data.index import Sample, ShardIndex, first_misfit, load_index, sha256
from flamingo.data.places import Place, expand_all, names_of
from flamingo.data.remote import Remote

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


class _Open:
    """A shard that is being read: its samples, and a file descriptor that it closes."""

    def __init__(self, samples: list[Sample], descriptor: int) -> None:
        self.samples, self.descriptor = samples, descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class ShardSet:
    """Shards as one table of samples that can be read in any order.

    Attributes:
        places, names: of the shards; a name is the path from their common folder.
        counts: int64[shards], samples in each.
        digests: of each shard's name, size and member table; contents: SHA-256 of each whole tar, "" where
            it is not known.
        manifest: digest of names, sizes and member tables; another one means other data.

    Args:
        patterns: see `places.expand_all`.
        keep: how many shards stay open at most, each with its index in memory.
        remote: how shards that lie in a store are fetched.
        may_be_empty: whether all of them may hold no sample, as one of many may.

    Raises:
        ValueError: no such shards, or none that holds a sample.
        ShardError: a shard that cannot be trusted, or not be fetched.
    """

    def __init__(
        self,
        patterns: str | Path | Sequence[str | Path],
        keep: int = 32,
        remote: Remote | None = None,
        may_be_empty: bool = False,
    ) -> None:
        remote = remote or Remote()
        self.places = expand_all(patterns, remote.allow_http, lambda glob: listed(glob, remote))
        self.names = names_of(self.places)
        self._open: Recent[_Open] = Recent(keep, self._open_shard)
        addresses = [place for place in self.places if isinstance(place, str)]
        self.far = Far(addresses, remote) if addresses else None
        indexes = map(self._index, self.places)
        told = [(i.count, i.digest(name), i.content) for i, name in zip(indexes, self.names, strict=True)]
        self.counts = np.array([count for count, _, _ in told], dtype=np.int64)
        self.digests = [digest for _, digest, _ in told]
        self.contents = [content for _, _, content in told]
        self.manifest = sha256("\n".join(self.digests).encode())
        if not may_be_empty and not self.counts.any():
            raise ValueError(f"`shards` ({patterns}) hold no sample: their tars are empty")

    def keys(self) -> Iterator[list[str]]:
        """The sample keys of each shard, in order."""
        for place in self.places:
            yield [key for key, _ in self._index(place).samples()]

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
            raise ShardError(self.places[shard], "the file became shorter while in use", key, start)
        return {
            name: block[offset - start : offset - start + size] for name, (offset, size) in members.items()
        }

    def prefetch(self, now: Sequence[int], soon: Sequence[int]) -> None:
        """Numbers of shards that are being read, and of those that come next: fetched on the side."""
        if self.far:
            near, later = ([self.places[shard] for shard in part] for part in (now, soon))
            self.far.prefetch(
                [p for p in near if isinstance(p, str)], [p for p in later if isinstance(p, str)]
            )

    def _index(self, place: Place) -> ShardIndex:
        if isinstance(place, Path):
            return load_index(place)
        assert self.far is not None
        return self.far.index(place)

    def _open_shard(self, shard: int) -> _Open:
        place = self.places[shard]
        index = self._index(place)
        if index.digest(self.names[shard]) != self.digests[shard]:
            what = "the shard was altered while in use, so the order of samples no longer holds"
            raise ShardError(place, what)
        try:
            samples = index.checked()
        except ValueError as error:
            raise ShardError(place, str(error)) from None
        if isinstance(place, Path):
            opened = _Open(samples, os.open(place, os.O_RDONLY))
        else:
            assert self.far is not None
            opened = _Open(samples, self.far.open(place))
        if misfit := first_misfit(opened.descriptor, samples):
            what = "its .index.jsonl is of another file: make it again with `flamingo data index`"
            raise ShardError(place, what, *misfit)
        return opened

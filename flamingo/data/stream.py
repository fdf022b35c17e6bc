"""Position -> document: the order of a source as a pure function.

Each epoch shuffles the shards, cuts them into windows of W shards, and shuffles the samples of a
window uniformly. Where position p lies follows from (seed, manifest, p) alone: no state, so a run
resumes exactly at any position, on any number of ranks and workers, and only W shards are in use
at a time. The shuffles are written out here because they must never change: numpy does not
promise the same permutation in its next release.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from flamingo.data.augment import augment
from flamingo.data.config import SourceConfig
from flamingo.data.document import Document
from flamingo.data.draws import Key, draw
from flamingo.data.errors import BadSample, Skipped, TooManyBadSamples
from flamingo.data.kinds import reader
from flamingo.data.shards import Recent, ShardSet
from flamingo.data.transforms import decoding_for

log = logging.getLogger(__name__)

WARNINGS = 10  # bad samples that are warned about one by one


def permutation(n: int, *key: Key) -> np.ndarray:
    """A key -> a uniform permutation of 0..n-1, int64[n], the same on every machine and for ever.

    Sorts the numbers by a hash (SplitMix64 counted up from `draw(*key)`). Each number rides in
    the low bits of its hash: no two are equal, so any sorting algorithm gives the same result.
    """
    numbers = np.arange(n, dtype=np.uint64)
    hashes = numbers * np.uint64(0x9E3779B97F4A7C15) + np.uint64(draw(*key))
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    hashes ^= hashes >> np.uint64(31)
    low = np.uint64((1 << max(1, (n - 1).bit_length())) - 1)
    hashes = (hashes & ~low) | numbers
    hashes.sort()
    return (hashes & low).astype(np.int64)


class Place(NamedTuple):
    """Where a position lies: shard and sample are numbers into the shard set."""

    epoch: int
    shard: int
    sample: int


class Order:
    """position -> Place, each sample exactly once per epoch.

    After O(shards) work once per epoch and O(samples) once per window, a look-up is a binary
    search: O(log shards).

    Args:
        counts: int64[shards], samples in each shard.
        window: shards that are shuffled together.
        key: seed and whatever else should make this order differ from others.
    """

    def __init__(self, counts: Sequence[int] | np.ndarray, window: int, *key: Key) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.window, self.key = window, key
        self.samples = int(self.counts.sum())  # of one epoch
        self._windows = -(-len(self.counts) // window)
        # Two of each: a batch may lie across a border.
        self._epochs: Recent[tuple[np.ndarray, np.ndarray]] = Recent(2, self._epoch)
        self._shuffles: Recent[np.ndarray] = Recent(2, self._shuffle)

    def locate(self, position: int, attempt: int = 0) -> Place:
        """Place of the sample at `position` (0, 1, 2, ... without end).

        With `attempt` k > 0: of the k-th replacement for a bad sample there. Replacements start
        anywhere in the same window and follow its order, so a small window is tried in full.
        """
        if position < 0:
            raise IndexError(f"position must be at least 0, not {position}")
        epoch, offset = divmod(position, self.samples)
        shards, starts = self._epochs[epoch]
        number = int(np.searchsorted(starts[:: self.window], offset, side="right")) - 1
        shuffle = self._shuffles[epoch * self._windows + number]
        first = int(starts[number * self.window])
        within = offset - first
        if attempt:
            within = (draw(*self.key, "replace", position) + attempt) % len(shuffle)
        offset = first + int(shuffle[within])
        rank = int(np.searchsorted(starts, offset, side="right")) - 1
        return Place(epoch, int(shards[rank]), offset - int(starts[rank]))

    def window_of(self, position: int) -> int:
        """Number of the window that a position lies in, counted over all epochs."""
        epoch, offset = divmod(position, self.samples)
        _, starts = self._epochs[epoch]
        number = int(np.searchsorted(starts[:: self.window], offset, side="right")) - 1
        return epoch * self._windows + number

    def shards_of(self, window: int) -> list[int]:
        """The shards that a window shuffles together."""
        epoch, number = divmod(window, self._windows)
        shards, _ = self._epochs[epoch]
        return shards[number * self.window : (number + 1) * self.window].tolist()

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards in the order of this epoch, and int64[shards + 1] positions where they start."""
        shards = permutation(len(self.counts), *self.key, "shards", epoch)
        return shards, np.concatenate([[0], np.cumsum(self.counts[shards])])

    def _shuffle(self, number: int) -> np.ndarray:
        """Order within a window; `number` counts windows over all epochs."""
        epoch, window = divmod(number, self._windows)
        _, starts = self._epochs[epoch]
        last = min((window + 1) * self.window, len(self.counts))
        samples = int(starts[last] - starts[window * self.window])
        return permutation(samples, *self.key, "samples", epoch, window)


class Stream:
    """The documents of one source, without end: `stream[position]`.

    Args:
        source: what the recipe says.
        seed: of the order. Sources with other shards have other orders under the same seed.
        max_bad: bad samples in a row after which the source itself is taken to be broken.
        image_side: pixels that pictures are shrunk to later; large JPEGs are decoded smaller then.
        has_features: asked with a content key, whether that picture need not be decoded.
    """

    def __init__(
        self,
        source: SourceConfig,
        seed: int,
        max_bad: int = 16,
        image_side: int | None = None,
        has_features: Callable[[str], bool] | None = None,
    ) -> None:
        self.name = source.name
        self.max_bad = max_bad
        self.shards = ShardSet(source.shards, min(2 * source.window, 256), source.remote)
        self.order = Order(self.shards.counts, source.window, seed, self.shards.manifest)
        self._read = reader(source.kind, source.options)
        self._p_next, self._seed, self._augment = source.p_next, seed, source.augment
        self._largest = source.max_sample_mb << 20
        # A random crop is enlarged: its pixels are wanted as they are.
        self._side = None if source.augment else image_side
        self._has_features = None if source.augment else has_features
        self._warned: set[str] = set()
        self._window = -1  # the one that was fetched ahead last

    @property
    def manifest(self) -> str:
        """Digest of the data: positions of two runs mean the same iff these are equal."""
        return self.shards.manifest

    def __getitem__(self, position: int) -> Document:
        return self.read(position)[0]

    def read(self, position: int) -> tuple[Document, list[Skipped]]:
        """The document at a position, and the bad samples that it stands for (mostly none).

        Raises:
            TooManyBadSamples: `max_bad` in a row are bad; lists them.
            ShardError: a shard changed since it was indexed.
        """
        skipped: list[Skipped] = []
        if self.shards.far and (window := self.order.window_of(position)) != self._window:
            self._window = window
            self.shards.prefetch(self.order.shards_of(window), self.order.shards_of(window + 1))
        for attempt in range(self.max_bad):
            place = self.order.locate(position, attempt)
            key = f"{self.name}/{self.shards.names[place.shard]}/{self.shards.key(place.shard, place.sample)}"
            try:
                sample = self.shards.read(place.shard, place.sample, self._largest)
                return self._document(sample, key, position), skipped
            except BadSample as error:
                skipped.append(Skipped(key, error.fault, error.detail))
                self._warn(skipped[-1])
        listed = "\n".join(f"  {bad.key}: {bad.fault}: {bad.detail}" for bad in skipped)
        raise TooManyBadSamples(
            f"source {self.name!r}: {len(skipped)} bad samples in a row for position {position}; "
            f"repair the shards, or check that `kind` fits them:\n{listed}"
        )

    def _document(self, sample: Mapping[str, bytes], key: str, position: int) -> Document:
        with decoding_for(self._side, self._has_features):
            document = self._read(sample, key)
        document = replace(document, seed=draw(self._seed, self.name, "document", position))
        return augment(document, self._augment) if self._augment else document

    def looks_ahead(self, position: int) -> bool:
        """Whether the words of the document at a position see the next image (`p_next`)."""
        return draw(self._seed, self.name, "p_next", position) < self._p_next * 2**64

    def _warn(self, bad: Skipped) -> None:
        if bad.key in self._warned or len(self._warned) >= WARNINGS:
            return
        self._warned.add(bad.key)
        log.warning("replaced bad sample %s: %s: %s", *bad)
        if len(self._warned) == WARNINGS:
            log.warning("source %r: further bad samples are counted without a warning", self.name)

"""Intervals and tests of figures that are means over queries, or of the whole (BLEU, ROC-AUC).

A query that was asked with several seeds counts as one: its answers are drawn together, since they are
about the same picture. So values come as `Clusters`: what a query's answers sum to, and how many they are.
Everything is drawn from a fixed seed: the same answers give the same figures.

Q queries, R resamples, V different queries as to sum and count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 2000  # of means
WHOLE_RESAMPLES = 200  # of metrics that only the whole has
WHOLE_SAMPLES = 100_000  # predictions that those are computed of in all: bounds their time
FLIPS = 10_000  # of the permutation test
CELLS = 4_000_000  # numbers held at a time
LEVEL = 0.95
Z = 1.959964  # of the normal distribution, for LEVEL
Interval = tuple[float, float]


@dataclass(frozen=True)
class Clusters:
    """sums, counts: float64[Q], of each query's answers. Their mean is sums.sum() / counts.sum()."""

    sums: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, by_seed: Sequence[Mapping[Any, float]]) -> Clusters:
        """From each seed's values by query; seeds may have asked other queries."""
        sums: dict[Any, float] = {}
        counts: dict[Any, int] = {}
        for values in by_seed:
            for query, value in values.items():
                sums[query] = sums.get(query, 0.0) + value
                counts[query] = counts.get(query, 0) + 1
        return cls(np.array(list(sums.values()), float), np.array(list(counts.values()), float))

    @property
    def mean(self) -> float:
        return float(self.sums.sum() / self.counts.sum())

    @property
    def binary(self) -> bool:
        """Whether every query is wholly right or wholly wrong."""
        return bool(np.isin(self.sums / self.counts, (0.0, 1.0)).all())


def interval(values: Clusters) -> Interval:
    """95 %: Wilson's for shares of right and wrong, which holds at 0 and 1 too; else a bootstrap."""
    if values.binary:
        return wilson(values.mean, len(values.sums))
    return percentiles(bootstrap(values))


def wilson(share: float, n: int) -> Interval:
    """Of a share of n (Wilson 1927)."""
    centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def percentiles(drawn: np.ndarray) -> Interval:
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def bootstrap(values: Clusters, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """float64[R]: the mean over queries drawn with replacement (Efron 1979)."""
    random = np.random.default_rng(seed)
    queries = len(values.sums)
    rows, times = np.unique(np.stack([values.sums, values.counts], 1), axis=0, return_counts=True)
    if len(rows) <= CELLS // resamples // 8:  # few different ones, as of shares: draw how often each comes
        totals = random.multinomial(queries, times / queries, size=resamples) @ rows  # [R, V] [V, 2]
        return totals[:, 0] / totals[:, 1]
    means = []
    step = max(1, CELLS // queries)
    for start in range(0, resamples, step):
        drawn = random.integers(queries, size=(min(step, resamples - start), queries), dtype=np.int32)
        means.append(values.sums[drawn].sum(1) / values.counts[drawn].sum(1))
    return np.concatenate(means)


def interval_of_whole(
    compute: Callable[[Sequence[int]], float], queries: int, value: float, seeds: int = 1, seed: int = 0
) -> Interval:
    """95 %, of a metric that has no values of single queries.

    compute(places) is the metric over the queries at these places of 0..Q-1, repeats kept; value: over
    all. Resamples of many queries would take hours, so they are smaller, and what they scatter by is
    scaled down to Q (Bickel, Goetze and van Zwet 1997). Those that have no value (one class only) are
    left out; (nan, nan) where most have none.
    """
    size = min(queries, max(2, WHOLE_SAMPLES // WHOLE_RESAMPLES // seeds))
    random = np.random.default_rng(seed)
    drawn = random.integers(queries, size=(WHOLE_RESAMPLES, size))
    values = np.array([compute(places.tolist()) for places in drawn])
    values = values[np.isfinite(values)]
    if len(values) < WHOLE_RESAMPLES // 2:
        return math.nan, math.nan
    low, high = percentiles((values - values.mean()) * math.sqrt(size / queries))
    return value + low, value + high


# ---- two models on the same queries --------------------------------------------------------------


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided p of McNemar's test: `won` queries only the other answered rightly, `lost` only
    the one; without a difference each of them falls either way as a coin does."""
    n, least = lost + won, min(lost, won)
    if n == 0:
        return 1.0
    k = np.arange(1, least + 1)
    log_choose = np.concatenate([[0.0], np.cumsum(np.log((n - k + 1) / k))])
    tail = np.exp(log_choose - n * math.log(2)).sum()
    return float(min(1.0, 2 * tail))


def sign_flips(differences: Clusters, flips: int = FLIPS, seed: int = 0) -> float:
    """Two-sided p of a paired permutation test (Fisher 1935): without a difference, each query's could as
    well have the other sign. At least 1 / (flips + 1)."""
    sizes, times = np.unique(np.abs(differences.sums), return_counts=True)
    sizes, times = sizes[sizes > 1e-12], times[sizes > 1e-12]
    if not len(sizes):
        return 1.0
    random, alone = np.random.default_rng(seed), times == 1
    observed = abs(float(differences.sums.sum()))
    as_far, step = 0, max(1, CELLS // len(sizes))
    for start in range(0, flips, step):
        rows = min(step, flips - start)
        heads = random.binomial(times[~alone], 0.5, size=(rows, (~alone).sum()))  # [R, V]
        signs = random.integers(2, size=(rows, alone.sum()), dtype=np.int8) * 2.0 - 1.0  # the same, sooner
        sums = (2 * heads - times[~alone]) @ sizes[~alone] + signs @ sizes[alone]
        as_far += int((np.abs(sums) >= observed * (1 - 1e-9)).sum())
    return (1 + as_far) / (1 + flips)


def holm(ps: Sequence[float]) -> list[float]:
    """The p-values as they count when so many tests are made together (Holm 1979), in the same order."""
    adjusted, highest = [0.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[place]))
        adjusted[place] = highest
    return adjusted

"""BLEU (Papineni et al. 2002), as pycocoevalcap computes it: one ratio over all captions, of which each is
held against the reference whose length is nearest, the shorter of two."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from operator import mul
from typing import NamedTuple

from flamingo.eval.benchmarks import Example, Prediction
from flamingo.eval.metrics._captions import Said, said
from flamingo.eval.metrics._ptb import words

ORDERS = 4
SCALE = 100.0
TINY, SMALL = 1e-15, 1e-9  # in numerators and denominators, as there


class Counts(NamedTuple):
    """Of captions: their tokens, those of the nearest references; by order, n-grams and those found."""

    length: int
    reference: int
    grams: tuple[int, ...]
    found: tuple[int, ...]


def grams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1))


@lru_cache(maxsize=1 << 16)
def counts(pair: Said) -> Counts:
    """Of one caption."""
    caption, references = words(pair[0]), [words(reference) for reference in pair[1]]
    length = len(caption)
    found = []
    for n in range(1, ORDERS + 1):
        most: Counter[tuple[str, ...]] = Counter()
        for reference in references:
            most |= grams(reference, n)
        found.append((grams(caption, n) & most).total())
    nearest = min((abs(len(r) - length), len(r)) for r in references)[1]
    return Counts(length, nearest, tuple(max(0, length - n) for n in range(ORDERS)), tuple(found))


def ratios(total: Counts) -> tuple[float, ...]:
    """BLEU-1 to BLEU-4, 0 to 1."""
    precisions = ((f + TINY) / (g + SMALL) for f, g in zip(total.found, total.grams, strict=True))
    ratio = (total.length + TINY) / (total.reference + SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    return tuple(
        product ** (1 / n) * brevity for n, product in enumerate(accumulate(precisions, mul), start=1)
    )


def of_all(pairs: Sequence[Said]) -> tuple[float, ...]:
    """BLEU-1 to BLEU-4 of captions together."""
    each = [counts(pair) for pair in pairs]
    return ratios(
        Counts(
            sum(c.length for c in each),
            sum(c.reference for c in each),
            tuple(map(sum, zip(*(c.grams for c in each), strict=True))),
            tuple(map(sum, zip(*(c.found for c in each), strict=True))),
        )
    )


def of_each(pairs: Sequence[Said]) -> list[tuple[float, ...]]:
    """BLEU-1 to BLEU-4 of each caption by itself. BLEU of all is not their mean."""
    return [ratios(counts(pair)) for pair in pairs]


def value_of(order: int) -> Callable[[Sequence[Prediction], Sequence[Example]], float]:
    """The `value` of a metric."""

    def value(predictions: Sequence[Prediction], examples: Sequence[Example]) -> float:
        """0 to 1, of all captions. Raises ValueError where references are missing."""
        return of_all(said(predictions, examples))[order - 1]

    return value


def per_sample(predictions: Sequence[Prediction], examples: Sequence[Example]) -> None:
    """Only the whole has a value."""

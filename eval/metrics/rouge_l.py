"""ROUGE-L (Lin 2004, section 3) of captions, as pycocoevalcap computes it: the longest common subsequence
with a reference, as a share of the caption and of the reference; of both the best of all references, and
their F with beta 1.2."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from statistics import fmean

from flamingo.eval.benchmarks import Example, Prediction
from flamingo.eval.metrics._captions import Said, have_references, said, tokenized

TITLE = "ROUGE-L"
SCALE = 100.0
BETA = 1.2


def per_sample(predictions: Sequence[Prediction], examples: Sequence[Example]) -> list[float] | None:
    """Of each caption, 0 to 1; None where a picture has no references."""
    return [score(pair) for pair in said(predictions, examples)] if have_references(examples) else None


def value(predictions: Sequence[Prediction], examples: Sequence[Example]) -> float:
    """The mean. Raises ValueError where references are missing."""
    return fmean(map(score, said(predictions, examples)))


@lru_cache(maxsize=1 << 16)
def score(pair: Said) -> float:
    """Tokens are what stands between blanks, so that no tokens count as one, an empty one, as there."""
    text, references = tokenized(pair)
    caption = text.split(" ")
    common = [(longest_common(caption, r.split(" ")), len(r.split(" "))) for r in references]
    precision = max(n / len(caption) for n, _ in common)
    recall = max(n / length for n, length in common)
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, one bit per token of `a` (Hyyro 2004)."""
    places: dict[str, int] = {}
    for at, token in enumerate(a):
        places[token] = places.get(token, 0) | 1 << at
    every = (1 << len(a)) - 1
    unmatched = every
    for token in b:
        matched = unmatched & places.get(token, 0)
        unmatched = ((unmatched + matched) | (unmatched - matched)) & every
    return len(a) - unmatched.bit_count()

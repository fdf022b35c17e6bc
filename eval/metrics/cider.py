"""CIDEr-D (Vedantam et al. 2015, sections 3 and 5), as pycocoevalcap computes it.

Of n-grams of 1 to 4 tokens: the cosine of their TF-IDF vectors, where a caption's counts are clipped to the
reference's, times a Gaussian of how much their lengths differ; the mean over n and the references, times 10.
Inverse document frequencies are of the references of all pictures that are scored together, so a caption's
value is another one among other pictures.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from statistics import fmean

from flamingo.eval.benchmarks import Example, Prediction
from flamingo.eval.metrics._captions import Said, have_references, said
from flamingo.eval.metrics._ptb import words

TITLE = "CIDEr-D"
SCALE = 100.0
ALONE = False  # a caption's value depends on the others
ORDERS = 4
SIGMA = 6.0

Gram = tuple[str, ...]
Vector = tuple[list[dict[Gram, float]], list[float], int]  # weights and norm by order; length


def per_sample(predictions: Sequence[Prediction], examples: Sequence[Example]) -> list[float] | None:
    """Of each caption, 0 to 10, by the IDF of all these references; None where a picture has none."""
    return scores(said(predictions, examples)) if have_references(examples) else None


def value(predictions: Sequence[Prediction], examples: Sequence[Example]) -> float:
    """The mean. Raises ValueError where references are missing."""
    return fmean(scores(said(predictions, examples)))


def scores(pairs: Sequence[Said]) -> list[float]:
    """CIDEr-D of each caption."""
    seen = Counter(gram for _, references in pairs for gram in {g for r in references for g in grams(r)})
    pictures = math.log(len(pairs))
    rarity = {gram: pictures - math.log(count) for gram, count in seen.items()}
    found = []
    for text, references in pairs:
        caption = vector(text, rarity, pictures)
        total = sum(similarity(caption, vector(r, rarity, pictures)) for r in references)
        found.append(10.0 * total / len(references))
    return found


@lru_cache(maxsize=1 << 15)  # about 6 KB each
def grams(caption: str) -> Counter[Gram]:
    """How often each n-gram occurs."""
    tokens = words(caption)
    return Counter(
        tuple(tokens[at : at + n]) for n in range(1, ORDERS + 1) for at in range(len(tokens) - n + 1)
    )


def vector(caption: str, rarity: dict[Gram, float], unseen: float) -> Vector:
    """TF-IDF. unseen: the IDF of an n-gram of no reference. The length counts pairs of tokens, as there."""
    weights: list[dict[Gram, float]] = [{} for _ in range(ORDERS)]
    length = 0
    for gram, count in grams(caption).items():
        weights[len(gram) - 1][gram] = count * rarity.get(gram, unseen)
        length += count * (len(gram) == 2)
    return weights, [math.sqrt(sum(w * w for w in order.values())) for order in weights], length


def similarity(caption: Vector, reference: Vector) -> float:
    """Mean over n of the clipped cosines, times the Gaussian of the difference in length."""
    (weights, norms, length), (others, other_norms, other_length) = caption, reference
    total = 0.0
    for order, other, norm, other_norm in zip(weights, others, norms, other_norms, strict=True):
        if norm and other_norm:
            dot = sum(min(weight, other[g]) * other[g] for g, weight in order.items() if g in other)
            total += dot / (norm * other_norm)
    return total / ORDERS * math.exp(-((length - other_length) ** 2) / (2 * SIGMA**2))

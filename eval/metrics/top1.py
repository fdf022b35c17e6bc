"""Share of queries whose likeliest class is the right one.

Case counts, unlike in `exact_match`: ImageNet has a cardigan and a Cardigan.
"""

from __future__ import annotations

from collections.abc import Sequence

from flamingo.eval.benchmarks import Example, Prediction

TITLE = "top-1 accuracy"
SCALE = 100.0


def per_sample(predictions: Sequence[Prediction], examples: Sequence[Example]) -> list[float]:
    """1 where the prediction is one of the answers, else 0."""
    pairs = zip(predictions, examples, strict=True)
    return [float(p.text.strip() in {a.strip() for a in e.answers}) for p, e in pairs]


def value(predictions: Sequence[Prediction], examples: Sequence[Example]) -> float:
    scores = per_sample(predictions, examples)
    return sum(scores) / len(scores)

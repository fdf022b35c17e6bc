"""Share of predictions that are one of the answers, but for case and surrounding blanks."""

from __future__ import annotations

from collections.abc import Sequence

from flamingo.eval.benchmarks import Example, Prediction

TITLE = "accuracy"
SCALE = 100.0


def per_sample(predictions: Sequence[Prediction], examples: Sequence[Example]) -> list[float]:
    """1 where the prediction is one of the answers, else 0."""
    pairs = zip(predictions, examples, strict=True)
    return [float(p.text.strip().lower() in {a.strip().lower() for a in e.answers}) for p, e in pairs]


def value(predictions: Sequence[Prediction], examples: Sequence[Example]) -> float:
    scores = per_sample(predictions, examples)
    return sum(scores) / len(scores)

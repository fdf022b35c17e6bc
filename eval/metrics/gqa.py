"""GQA accuracy: the share of predictions that are the answer, letter for letter (Hudson and Manning 2019)."""

from __future__ import annotations

from collections.abc import Sequence

from flamingo.eval.benchmarks import Example, Prediction
from flamingo.eval.metrics import _vqa

TITLE = "GQA accuracy"
SCALE = _vqa.SCALE


def accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1 where the prediction is the answer, else 0."""
    return float(prediction in answers)


def per_sample(predictions: Sequence[Prediction], examples: Sequence[Example]) -> list[float] | None:
    """See `_vqa.per_sample`: None where an example has no answer."""
    return _vqa.per_sample(accuracy, predictions, examples)


def value(predictions: Sequence[Prediction], examples: Sequence[Example]) -> float:
    """The mean accuracy. Raises ValueError where answers are missing."""
    return _vqa.value(accuracy, predictions, examples)

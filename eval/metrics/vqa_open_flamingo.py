"""VQA accuracy, as OpenFlamingo's evaluation computes it (Awadalla et al. 2023; release 2.0.1).

Prediction and answers are always normalised, also where all answers are the same text.
"""

from __future__ import annotations

from collections.abc import Sequence

from flamingo.eval.benchmarks import Example, Prediction
from flamingo.eval.metrics import _vqa

TITLE = "VQA accuracy, always normalised"
SCALE = _vqa.SCALE


def accuracy(prediction: str, answers: Sequence[str]) -> float:
    """0 to 1, of one prediction."""
    said, *given = (_vqa.normalised(_vqa.one_line(text)) for text in (prediction, *answers))
    return _vqa.agreement(said, given)


def per_sample(predictions: Sequence[Prediction], examples: Sequence[Example]) -> list[float] | None:
    """See `_vqa.per_sample`: None where an example has no answers."""
    return _vqa.per_sample(accuracy, predictions, examples)


def value(predictions: Sequence[Prediction], examples: Sequence[Example]) -> float:
    """The mean accuracy. Raises ValueError where answers are missing."""
    return _vqa.value(accuracy, predictions, examples)

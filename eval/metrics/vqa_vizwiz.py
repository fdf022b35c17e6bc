"""VQA accuracy, as the evaluation of VizWiz computes it (Gurari et al. 2018; its Python API).

Only the prediction is normalised, always; the answers were when they were published.
"""

from __future__ import annotations

from collections.abc import Sequence

from flamingo.eval.benchmarks import Example, Prediction
from flamingo.eval.metrics import _vqa

TITLE = "VizWiz accuracy"
SCALE = _vqa.SCALE


def accuracy(prediction: str, answers: Sequence[str]) -> float:
    """0 to 1, of one prediction."""
    return _vqa.agreement(_vqa.normalised(_vqa.one_line(prediction)), answers)


def per_sample(predictions: Sequence[Prediction], examples: Sequence[Example]) -> list[float] | None:
    """See `_vqa.per_sample`: None where an example has no answers."""
    return _vqa.per_sample(accuracy, predictions, examples)


def value(predictions: Sequence[Prediction], examples: Sequence[Example]) -> float:
    """The mean accuracy. Raises ValueError where answers are missing."""
    return _vqa.value(accuracy, predictions, examples)

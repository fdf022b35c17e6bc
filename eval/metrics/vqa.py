"""VQA accuracy, as the official evaluation computes it (github.com/GT-Vision-Lab/VQA, the current code).

Prediction and answers are normalised only if the answers are not all the same text: where ten people wrote
"yes", "Yes." is wrong. Figures of OpenFlamingo are made without this exception: vqa_open_flamingo.
"""

from __future__ import annotations

from collections.abc import Sequence

from flamingo.eval.benchmarks import Example, Prediction
from flamingo.eval.metrics import _vqa

TITLE = "VQA accuracy"
SCALE = _vqa.SCALE


def accuracy(prediction: str, answers: Sequence[str]) -> float:
    """0 to 1, of one prediction."""
    said, given = _vqa.one_line(prediction), [_vqa.one_line(answer) for answer in answers]
    if len(set(given)) > 1:
        said, given = _vqa.normalised(said), [_vqa.normalised(answer) for answer in given]
    return _vqa.agreement(said, given)


def per_sample(predictions: Sequence[Prediction], examples: Sequence[Example]) -> list[float] | None:
    """See `_vqa.per_sample`: None where an example has no answers."""
    return _vqa.per_sample(accuracy, predictions, examples)


def value(predictions: Sequence[Prediction], examples: Sequence[Example]) -> float:
    """The mean accuracy. Raises ValueError where answers are missing."""
    return _vqa.value(accuracy, predictions, examples)

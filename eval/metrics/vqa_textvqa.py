"""VQA accuracy, as the evaluation of TextVQA computes it (Singh et al. 2019; its code in Pythia and MMF).

Always normalised; before that, commas and question marks go and "'s" becomes a word of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from flamingo.eval.benchmarks import Example, Prediction
from flamingo.eval.metrics import _vqa

TITLE = "TextVQA accuracy"
SCALE = _vqa.SCALE


def accuracy(prediction: str, answers: Sequence[str]) -> float:
    """0 to 1, of one prediction."""
    said, *given = (_normalised(text) for text in (prediction, *answers))
    return _vqa.agreement(said, given)


def _normalised(text: str) -> str:
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return _vqa.normalised(_vqa.one_line(text))


def per_sample(predictions: Sequence[Prediction], examples: Sequence[Example]) -> list[float] | None:
    """See `_vqa.per_sample`: None where an example has no answers."""
    return _vqa.per_sample(accuracy, predictions, examples)


def value(predictions: Sequence[Prediction], examples: Sequence[Example]) -> float:
    """The mean accuracy. Raises ValueError where answers are missing."""
    return _vqa.value(accuracy, predictions, examples)

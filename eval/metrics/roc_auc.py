"""Area under the ROC curve of a yes-or-no question, from scikit-learn.

The benchmark's classes are two, of which the first is the positive one; a query's score is the
probability of that one, the softmax of both log-likelihoods, so that prompts of other lengths compare.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from flamingo.eval.benchmarks import Example, Prediction

TITLE = "ROC-AUC"
SCALE = 100.0
POSITIVE = "yes"


def per_sample(predictions: Sequence[Prediction], examples: Sequence[Example]) -> None:
    """Only the whole has a value."""


def value(predictions: Sequence[Prediction], examples: Sequence[Example]) -> float:
    """Nan where all examples are of one class: there is no pair to put in order.

    Raises ValueError for predictions without the log-likelihoods of two classes, and for answers that
    are neither "yes" nor "no".
    """
    try:
        from sklearn.metrics import roc_auc_score
    except ImportError:
        raise ValueError("ROC-AUC needs scikit-learn: pip install 'flamingo-vlm[eval]'") from None
    labels = [_label(e) for e in examples]
    scores = [probability(p) for p in predictions]
    if len(set(labels)) < 2:
        return math.nan
    return float(roc_auc_score(labels, scores))


def probability(prediction: Prediction) -> float:
    """Of the positive class, by log-likelihoods of both."""
    if len(prediction.scores) != 2:
        raise ValueError(
            f"ROC-AUC needs the likelihoods of two classes, {prediction.id!r} has {len(prediction.scores)}: "
            "give the benchmark CLASSES of two and MAX_NEW_TOKENS = 0, or choose another metric"
        )
    yes, no = prediction.scores
    return 0.5 * (1 + math.tanh((yes - no) / 2))  # the softmax, without overflow


def _label(example: Example) -> bool:
    if example.answers[:1] not in (("yes",), ("no",)):
        raise ValueError(f"ROC-AUC: the answer of {example.id!r} is {example.answers!r}, not yes or no")
    return example.answers[0] == POSITIVE

"""RefCLIPScore (Hessel et al. 2021, section 3.1): CLIPScore, and how near the caption is to a reference.

Their harmonic mean; near is the highest cosine of texts, 0 where that is negative.
"""

from __future__ import annotations

from collections.abc import Sequence

from flamingo.eval.benchmarks import Example, Prediction
from flamingo.eval.metrics import _clip
from flamingo.eval.metrics._captions import have_references, said

TITLE = "RefCLIPScore"
SCALE = 100.0
ALONE = False  # as of clip_score


def per_sample(predictions: Sequence[Prediction], examples: Sequence[Example]) -> list[float] | None:
    """Of each caption; None where a picture has no references. Raises ValueError, as clip_score."""
    return _scores(predictions, examples) if have_references(examples) else None


def value(predictions: Sequence[Prediction], examples: Sequence[Example]) -> float:
    """The mean. Raises ValueError, as clip_score, and where references are missing."""
    scores = _scores(predictions, examples)
    return sum(scores) / len(scores)


def _scores(predictions: Sequence[Prediction], examples: Sequence[Example]) -> list[float]:
    captions, references = zip(*said(predictions, examples), strict=True)
    by = _clip.encoder()
    scores = _clip.clip_scores(by, captions, [example.image for example in examples])
    return _clip.ref_clip_scores(by, scores, captions, references).tolist()

"""CLIPScore (Hessel et al. 2021): how well a caption fits its picture, by a CLIP, without references.

2.5 times the cosine of "A photo depicts CAPTION" with the picture, 0 where that is negative. The encoder
is the paper's, or the one that FLAMINGO_CLIP_SCORE names: scores of two encoders cannot be compared.
"""

from __future__ import annotations

from collections.abc import Sequence

from flamingo.eval.benchmarks import Example, Prediction
from flamingo.eval.metrics import _clip

TITLE = "CLIPScore"
SCALE = 100.0
ALONE = False  # it could, but not while the model that is asked fills the memory


def per_sample(predictions: Sequence[Prediction], examples: Sequence[Example]) -> list[float] | None:
    """Of each caption, 0 to 2.5. Raises ValueError for an encoder or picture that is not there."""
    captions, pictures = [p.text for p in predictions], [e.image for e in examples]
    return _clip.clip_scores(_clip.encoder(), captions, pictures).tolist()


def value(predictions: Sequence[Prediction], examples: Sequence[Example]) -> float:
    """The mean. Raises ValueError, as `per_sample`."""
    scores = per_sample(predictions, examples) or []
    return sum(scores) / len(scores)

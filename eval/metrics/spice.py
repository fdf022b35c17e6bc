"""SPICE (Anderson et al. 2016) through pycocoevalcap, in Java (8 is what it was made for).

At its first use pycocoevalcap downloads Stanford CoreNLP 3.6.0 with its models, some 500 MB, into its own
folder, which must be writable.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from functools import lru_cache

from flamingo.eval.benchmarks import Example, Prediction
from flamingo.eval.metrics._captions import Said, have_references, said, scorer, tokenized

TITLE = "SPICE"
SCALE = 100.0
ALONE = False  # it could, but each start of Java takes many seconds


def per_sample(predictions: Sequence[Prediction], examples: Sequence[Example]) -> list[float] | None:
    """F of each caption, 0 to 1; None where a picture has no references.

    Raises ValueError without pycocoevalcap, Java or the models.
    """
    return list(scores(tuple(said(predictions, examples)))) if have_references(examples) else None


def value(predictions: Sequence[Prediction], examples: Sequence[Example]) -> float:
    """The mean. Raises ValueError, as `per_sample`, and where references are missing."""
    found = scores(tuple(said(predictions, examples)))
    return sum(found) / len(found)


@lru_cache(maxsize=8)
def scores(pairs: tuple[Said, ...]) -> tuple[float, ...]:
    """F of each caption: all in one run of Java."""
    tokens = dict(enumerate(map(tokenized, pairs)))
    references = {at: list(given) for at, (_, given) in tokens.items()}
    captions = {at: [caption] for at, (caption, _) in tokens.items()}
    try:
        spice = scorer(TITLE, "spice.spice", "Spice")
        _, found = spice.compute_score(references, captions)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(
            f"SPICE did not run: {error}. It downloads models at its first use and needs a network, "
            "write access to pycocoevalcap's folder, 8 GB of memory and a Java it knows, such as 8"
        ) from None
    return tuple(float(each["All"]["f"]) for each in found)

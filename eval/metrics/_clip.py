"""CLIPScore and RefCLIPScore (Hessel et al. 2021, sections 3 and 3.1) by any encoder of open_clip.

N captions, D width of a vector.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from flamingo.eval.embedding import Encoder, Item, Part, load
from flamingo.eval.retrieval.places import cache_folder
from flamingo.eval.vectors import Vectors, picture_keys, text_key

ENCODER = "open_clip:ViT-B-32/openai"  # the paper's
NAMED_BY = "FLAMINGO_CLIP_SCORE"  # the variable that names another
PREFIX = "A photo depicts "  # before every caption
WEIGHT = 2.5  # stretches cosines, which rarely leave 0 to 0.4


@lru_cache(maxsize=1)
def _loaded(name: str) -> Encoder:
    return load(name)


def encoder(name: str | None = None) -> Encoder:
    """By name; None: as the environment says, or the paper's.

    Raises ValueError for one that is not there, or has no space that pictures and texts share.
    """
    found = _loaded(name or os.environ.get(NAMED_BY) or ENCODER)
    if found.logits() is None:
        raise ValueError(
            f"CLIPScore compares pictures with texts, and {found.name} has no space that they share: use an "
            "encoder of open_clip"
        )
    return found


def clip_scores(by: Encoder, captions: Sequence[str], pictures: Sequence[Path]) -> np.ndarray:
    """float64[N], 0 to 2.5: of each caption with its picture. Vectors are kept in the cache folder.

    Raises ValueError for no captions, and a picture that is not there or cannot be read.
    """
    if not captions:
        raise ValueError("no captions to score: the evaluation asked no query")
    if missing := next((picture for picture in pictures if not picture.is_file()), None):
        raise ValueError(f"CLIPScore looks at the pictures, and {missing} is not there")
    keys = picture_keys(cache_folder(), pictures)
    seen = _vectors(by, "image", {keys[picture]: picture for picture in pictures})
    said = _texts(by, captions)
    cosines = [seen[keys[p]] @ said[text] for p, text in zip(pictures, captions, strict=True)]
    return WEIGHT * np.maximum(np.array(cosines), 0.0)


def ref_clip_scores(
    by: Encoder, scores: np.ndarray, captions: Sequence[str], references: Sequence[Sequence[str]]
) -> np.ndarray:
    """float64[N]: the harmonic mean of each CLIPScore and the caption's highest cosine with a reference.

    Raises ValueError for a caption without references.
    """
    if without := sum(not each for each in references):
        raise ValueError(f"{without} of {len(references)} captions have no references")
    said = _texts(by, [*captions, *(text for each in references for text in each)])
    pairs = zip(captions, references, strict=True)
    nearest = [max(0.0, *(said[text] @ said[other] for other in each)) for text, each in pairs]
    total = scores + nearest
    return np.divide(2 * scores * nearest, total, out=np.zeros_like(total), where=total > 0)


def _texts(by: Encoder, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Text -> its vector behind the prefix."""
    prompts = {text: PREFIX + text.strip() for text in texts}
    found = _vectors(by, "text", {text_key(prompt): prompt for prompt in prompts.values()})
    return {text: found[text_key(prompt)] for text, prompt in prompts.items()}


def _vectors(by: Encoder, part: Part, items: dict[str, Item]) -> dict[str, np.ndarray]:
    """Key -> float64[D]."""
    rows = Vectors(cache_folder()).get(by, part, items).astype(np.float64)
    return dict(zip(items, rows, strict=True))

"""METEOR 1.5 (Denkowski and Lavie 2014) through pycocoevalcap, in Java.

As there, the figure is one of all captions' counts together, not a mean of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

from flamingo.eval.benchmarks import Example, Prediction
from flamingo.eval.metrics._captions import Said, said, scorer, tokenized

TITLE = "METEOR"
SCALE = 100.0
ALONE = False


def per_sample(predictions: Sequence[Prediction], examples: Sequence[Example]) -> None:
    """Only the whole has a value."""


def value(predictions: Sequence[Prediction], examples: Sequence[Example]) -> float:
    """0 to 1. Raises ValueError without pycocoevalcap or Java, and where references are missing."""
    pairs = said(predictions, examples)
    line = " ||| ".join(["EVAL", *map(counts, pairs)])
    return [float(answer) for answer in ask(line, len(pairs) + 1)][-1]


@lru_cache(maxsize=1 << 17)
def counts(pair: Said) -> str:
    """What METEOR counted of a caption, as its process says it."""
    caption, references = tokenized(pair)
    return ask(" ||| ".join(["SCORE", *references, caption]), 1)[0]


def ask(line: str, answers: int) -> list[str]:
    """The lines that the process answers with. Raises ValueError where it ends instead."""
    process = running().meteor_p
    try:
        process.stdin.write(f"{line}\n".encode())
        process.stdin.flush()
        lines = [process.stdout.readline().decode().strip() for _ in range(answers)]
    except OSError:
        lines = [""]
    if not all(lines):
        with suppress(OSError):
            process.stdin.close()  # else it is tried again, and told of, when the object goes
        running.cache_clear()
        raise ValueError(f"METEOR's Java process ended at {line[:200]!r}: does it have 2 GB of memory?")
    return lines


@lru_cache(maxsize=1)
def running() -> Any:
    """pycocoevalcap's METEOR, whose Java process lives as long as this one."""
    return scorer(TITLE, "meteor.meteor", "Meteor")

"""What caption metrics share: pictures with their captions as tokens, and pycocoevalcap for those in Java."""

from __future__ import annotations

import importlib
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

from flamingo.eval.benchmarks import Example, Prediction
from flamingo.eval.metrics._ptb import tokenize

EXTRA = "pip install 'flamingo-vlm[captions]'"
JAVA_SECONDS = 60  # to say its version

Said = tuple[str, tuple[str, ...]]  # a caption, and the reference captions of its picture


def have_references(examples: Sequence[Example]) -> bool:
    return all(example.answers for example in examples)


def said(predictions: Sequence[Prediction], examples: Sequence[Example]) -> list[Said]:
    """Each caption with its references, as written. Raises ValueError where there are none."""
    if not examples:
        raise ValueError("no captions to score: the evaluation asked no query")
    without = [example for example in examples if not example.answers]
    if without:
        raise ValueError(
            f"{len(without)} of {len(examples)} pictures have no reference captions, the first is "
            f"{without[0].id}: those of this split are not published. The predictions are kept; send them to "
            "the benchmark's server, or choose another --split"
        )
    return [(p.text, e.answers) for p, e in zip(predictions, examples, strict=True)]


def tokenized(pair: Said) -> Said:
    """The same as tokens with a blank between."""
    return tokenize(pair[0]), tuple(map(tokenize, pair[1]))


def scorer(metric: str, module: str, name: str) -> Any:
    """A scorer of pycocoevalcap that runs Java, e.g. "meteor.meteor", "Meteor".

    Raises ValueError unless that package and Java are there.
    """
    try:
        made = getattr(importlib.import_module(f"pycocoevalcap.{module}"), name)
    except ImportError:
        raise ValueError(
            f"{metric} needs pycocoevalcap and Java: {EXTRA}, and install a Java runtime"
        ) from None
    java = shutil.which("java")
    if java is None:
        raise ValueError(f"{metric} needs Java, and there is no `java` on the PATH: install a Java runtime")
    try:
        ran = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=JAVA_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"{metric} needs Java, and {java} does not run: {error}") from None
    if ran.returncode:
        raise ValueError(f"{metric} needs Java, and {java} does not run: {ran.stderr.strip()[:200]}")
    return made()

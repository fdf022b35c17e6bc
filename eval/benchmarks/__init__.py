"""Benchmarks, one file each. A benchmark is a module with

TITLE, DESCRIPTION: str            its name in reports, and what it is, in a sentence
LICENCE, SOURCE: str               of its data, and where that is published
FILES: dict[str, tuple[File, ...]] what each split needs in the data folder, by split
QUERIES, DEMONSTRATIONS: str       the split that is asked, and the one that shots are drawn from
METRICS: tuple[str, ...]           names in `flamingo.eval.metrics`; the first is the score
MAX_NEW_TOKENS: int                of a generated answer; 0: the classes are ranked by likelihood
BLIND: float | None                what the score is without looking, where that was measured
examples(folder, split) -> list[Example]    one split, from the official files
prompt(example) -> str             text up to where the model goes on, as in the papers
completion(example) -> str         what a shot continues its prompt with
tidy(text) -> str                  a generated text as the official evaluator would take it
and, where it has them:
CLASSES(folder) -> tuple[str, ...] what is ranked, as continuations of the prompt
MEAN_LIKELIHOOD = True             classes are ranked by the mean over their tokens, not by the sum
PROMPTS: tuple[Callable, ...]      other templates, for prompt ensembling
HUB: hub.Copy                      a maintained copy on the Hugging Face hub
BUNDLED = True                     it needs no data folder

Shapes of the data are the official files'; nothing is converted beforehand.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

NEEDED = "TITLE DESCRIPTION LICENCE SOURCE FILES QUERIES DEMONSTRATIONS METRICS MAX_NEW_TOKENS BLIND"
CALLED = "examples prompt completion tidy"


@dataclass(frozen=True)
class File:
    """A file or folder that a split needs.

    Attributes:
        path: inside the data folder, as it is named when unpacked; where: the address it is published at.
        images: a folder of pictures, of which only those that the annotations name are needed.
    """

    path: str
    where: str
    images: bool = False


@dataclass(frozen=True)
class Example:
    """One question about one picture.

    Attributes:
        id: unique within its benchmark and split, as in the official files.
        answers: all reference answers or captions, as given, repeats kept; for classes the right one.
        kind: a group whose score is told apart; "" for none.
        context: further text of the picture that a prompt may use (the words of a meme, OCR tokens).
    """

    id: str
    image: Path
    question: str = ""
    answers: tuple[str, ...] = ()
    kind: str = ""
    context: str = ""


@dataclass(frozen=True)
class Prediction:
    """What the model said of an example.

    Attributes:
        text: the tidied answer; of ranked classes the likeliest.
        scores: log-likelihood of each class, calibrated if asked for; empty for generated text.
    """

    id: str
    text: str
    scores: tuple[float, ...] = ()


def names() -> list[str]:
    """The benchmarks of this folder."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def load(name: str) -> ModuleType:
    """A benchmark by name or dotted path. Raises ValueError, naming the choices or what it lacks."""
    if name.replace("-", "_") in names():
        return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    if "." not in name:
        raise ValueError(
            f"benchmark {name!r}: choose one of {', '.join(names())}, or name a module: my.module"
        )
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"benchmark {name!r} cannot be imported: {error}; name the folder that it lies in with PYTHONPATH"
        ) from None
    if lacking := [n for n in f"{NEEDED} {CALLED}".split() if not hasattr(module, n)]:
        raise ValueError(f"benchmark {name!r} lacks {', '.join(lacking)}: see flamingo/eval/benchmarks")
    return module

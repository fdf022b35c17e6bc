"""What a query is asked with: its shots, and the controls that show whether images matter.

Everything here is a pure function of the setting and the query, so that any rank asks the same.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Literal

from flamingo.eval.benchmarks import Example
from flamingo.processing import END_OF_CHUNK, IMAGE

Control = Literal["blank", "text_only_shots", "shuffled_shots"]
Source = Literal["random", "fixed", "similar"]
CONTROLS: dict[str, str] = {
    "blank": "images blanked",
    "text_only_shots": "shots without images",
    "shuffled_shots": "shots with each other's images",
}
SOURCES: dict[str, str] = {
    "random": "drawn anew for each query",
    "fixed": "the same for all queries",
    "similar": "the nearest to the query (RICES)",
}
TEXT_SHOTS = 2  # without pictures, for 0 shots as in the papers


@dataclass(frozen=True)
class Setting:
    """How queries are asked.

    Attributes:
        control: None; "blank": every picture replaced by one of the mean colour; "text_only_shots":
            the shots keep their text and lose their pictures; "shuffled_shots": each shot has the
            picture of another.
        limit: a fixed sample of so many queries; None: all. source: where shots come from.
        text_shots: with 0 shots, two shots without pictures (Alayrac et al. 2022, appendix A.2).
    """

    shots: int = 0
    control: Control | None = None
    limit: int | None = None
    seed: int = 0
    source: Source = "random"
    text_shots: bool = False

    def __post_init__(self):
        if self.shots < 0:
            raise ValueError(f"shots={self.shots}: must be at least 0")
        if self.control not in (None, *CONTROLS):
            raise ValueError(f"control={self.control!r}: choose one of {', '.join(CONTROLS)}")
        if self.source not in SOURCES:
            raise ValueError(f"shots_from={self.source!r}: choose one of {', '.join(SOURCES)}")
        least = {"text_only_shots": 1, "shuffled_shots": 2}.get(self.control or "", 0)
        if self.shots < least:
            raise ValueError(f"control={self.control!r} needs shots={least} or more")

    @property
    def name(self) -> str:
        """Of all its seeds, as reports say it."""
        return f"{self.shots}-shot" + (f", {CONTROLS[self.control]}" if self.control else "")

    @property
    def slug(self) -> str:
        """Of its file of answers."""
        return f"{self.shots}-shot" + (f"-{self.control}" if self.control else "") + f"-seed{self.seed}"

    @property
    def examples_before(self) -> int:
        """Shots in the prompt, with pictures or without."""
        return self.shots or (TEXT_SHOTS if self.text_shots else 0)


@dataclass(frozen=True)
class Prompt:
    """A query and what stands before it, with one <image> in the texts per picture; None stands for
    a blank picture. Prompts of fixed shots have the same prefix, which is then computed once.

    Attributes:
        prefix, prefix_images: all shots; "" and () without any.
        text, images: the query.
        shots: the examples in the prefix, in order.
    """

    example: Example
    prefix: str
    prefix_images: tuple[Path | None, ...]
    text: str
    images: tuple[Path | None, ...]
    shots: tuple[Example, ...] = ()


def sample(queries: Sequence[Example], setting: Setting) -> list[Example]:
    """The queries of a setting: all, or a fixed sample that depends on the seed alone."""
    return limited(queries, setting.limit, setting.seed)


def limited(examples: Sequence[Example], limit: int | None, seed: int = 0) -> list[Example]:
    """A fixed sample of at most `limit` examples; all of them in their order where that is None."""
    if limit is None or limit >= len(examples):
        return list(examples)
    return random.Random(seed).sample(list(examples), limit)


def choose_shots(
    pool: Sequence[Example],
    query: Example,
    setting: Setting,
    neighbours: Mapping[str, Sequence[Example]] | None = None,
) -> list[Example]:
    """Shots of one query, in the order of the prompt; never the query itself, nor its picture.

    neighbours: by query id, nearest first, for source="similar"; the nearest stands last in the
    prompt, next to the query, as in Yang et al. 2022. Raises ValueError where there are too few.
    """
    count = setting.examples_before
    if not count:
        return []
    if setting.source == "similar":
        assert neighbours is not None, "shots by similarity need neighbours"
        found = [e for e in neighbours[query.id] if _other(e, query)][:count][::-1]
        return _enough(found, count)
    key = "fixed" if setting.source == "fixed" else query.id
    digest = hashlib.sha256(f"{setting.seed}/{key}".encode()).digest()
    drawn = random.Random(int.from_bytes(digest[:8], "big"))
    order = drawn.sample(range(len(pool)), min(len(pool), count + 16))
    return _enough([pool[i] for i in order if _other(pool[i], query)][:count], count)


def _other(shot: Example, query: Example) -> bool:
    return shot.image != query.image and (shot.id != query.id or shot.question != query.question)


def _enough(found: list[Example], count: int) -> list[Example]:
    if len(found) < count:
        raise ValueError(
            f"shots={count}: only {len(found)} demonstrations are there; ask for fewer, or raise pool"
        )
    return found


def build(
    benchmark: ModuleType,
    query: Example,
    shots: Sequence[Example],
    setting: Setting,
    template: Callable[[Example], str] | None = None,
) -> Prompt:
    """Shots and query as texts, as in training: each turn ends with <|endofchunk|>.

    template: another than the benchmark's own `prompt`.
    """
    ask = template or benchmark.prompt
    see_shots = bool(setting.shots) and setting.control != "text_only_shots"
    blank = setting.control == "blank"
    pictures = [shot.image for shot in shots]
    if setting.control == "shuffled_shots":  # by one place: each shot has another's for certain
        pictures = pictures[1:] + pictures[:1]
    mark = IMAGE if see_shots else ""
    parts = [f"{mark}{ask(shot)}{benchmark.completion(shot)}{END_OF_CHUNK}" for shot in shots]
    seen: list[Path | None] = [None if blank else p for p in pictures] if see_shots else []
    query_image = (None if blank else query.image,)
    return Prompt(query, "".join(parts), tuple(seen), f"{IMAGE}{ask(query)}", query_image, tuple(shots))


def blanked(prompt: Prompt) -> Prompt:
    """The same prompt about a blank picture: what the shots alone say, for calibration."""
    return replace(prompt, images=(None,) * len(prompt.images))


def shuffled(prompt_shots: Sequence[Example], number: int, query: Example) -> list[Example]:
    """The shots in another order, for ensembling; number 0 is the order that they have."""
    if not number:
        return list(prompt_shots)
    digest = hashlib.sha256(f"order/{number}/{query.id}".encode()).digest()
    order = list(prompt_shots)
    random.Random(int.from_bytes(digest[:8], "big")).shuffle(order)
    return order

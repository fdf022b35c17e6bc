"""What a query is asked with: its shots, and the controls that show whether images matter."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from flamingo.eval.benchmarks import Example
from flamingo.processing import END_OF_CHUNK, IMAGE

CONTROLS = ("blank", "text_only_shots")


@dataclass(frozen=True)
class Setting:
    """How queries are asked.

    control: None; "blank": every picture replaced by one of the mean colour; "text_only_shots":
    the shots keep their text and lose their pictures. limit: a fixed sample of so many queries.
    """

    shots: int = 0
    control: str | None = None
    limit: int | None = None
    seed: int = 0

    def __post_init__(self):
        if self.shots < 0:
            raise ValueError(f"shots={self.shots}: must be at least 0")
        if self.control not in (None, *CONTROLS):
            raise ValueError(f"control={self.control!r}: choose one of {', '.join(CONTROLS)}")
        if self.control == "text_only_shots" and not self.shots:
            raise ValueError("control='text_only_shots' needs shots=1 or more")

    @property
    def name(self) -> str:
        words = {None: "", "blank": ", images blanked", "text_only_shots": ", shots without images"}
        return f"{self.shots}-shot{words[self.control]}"

    @property
    def slug(self) -> str:
        return f"{self.shots}-shot" + (f"-{self.control}" if self.control else "")


@dataclass(frozen=True)
class Prompt:
    """Text with one <image> per picture; None stands for a blank picture."""

    example: Example
    text: str
    images: tuple[Path | None, ...]


def sample(queries: Sequence[Example], setting: Setting) -> list[Example]:
    """The queries of a setting: all, or a fixed sample that depends on the seed alone."""
    if setting.limit is None or setting.limit >= len(queries):
        return list(queries)
    return random.Random(setting.seed).sample(list(queries), setting.limit)


def choose_shots(pool: Sequence[Example], query: Example, setting: Setting) -> list[Example]:
    """Random shots for one query, a pure function of seed and query: the same on any rank."""
    if setting.shots > len(pool):
        raise ValueError(f"shots={setting.shots}: only {len(pool)} demonstrations are there")
    digest = hashlib.sha256(f"{setting.seed}/{query.id}".encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big")).sample(list(pool), setting.shots)


def build(benchmark: ModuleType, pool: Sequence[Example], query: Example, setting: Setting) -> Prompt:
    """Shots and query as one text, as in training: each turn ends with <|endofchunk|>."""
    blank, see_shots = setting.control == "blank", setting.control != "text_only_shots"
    parts, images = [], []
    for shot in choose_shots(pool, query, setting):
        picture = IMAGE if see_shots else ""
        parts.append(f"{picture}{benchmark.prompt(shot)}{benchmark.completion(shot)}{END_OF_CHUNK}")
        if see_shots:
            images.append(None if blank else shot.image)
    parts.append(f"{IMAGE}{benchmark.prompt(query)}")
    images.append(None if blank else query.image)
    return Prompt(query, "".join(parts), tuple(images))

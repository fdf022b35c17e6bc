"""What an index is made of: the contents of demonstrations, and what every index says of itself.

R rows, D width of a vector.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pydantic

from flamingo.eval.benchmarks import Example
from flamingo.eval.embedding import PARTS, Encoder, Part
from flamingo.eval.vectors import Vectors, text_key

LIBRARIES = ("open_clip_torch", "torch", "transformers")
NAMED = 100  # items of a row that are named beside it


@dataclass
class Contents:
    """What of examples is compared: keys of their pictures and texts.

    Attributes:
        rows: one key per part, each once, in the order of the examples; members: positions of each.
        items: of each part, what the vector of a key is made of.
    """

    examples: list[Example]
    pictures: list[str]
    rows: list[tuple[str, ...]]
    members: list[list[int]]
    items: dict[str, dict[str, Path | str]]

    @classmethod
    def of(cls, examples: list[Example], pictures: Mapping[Path, str], similarity: str) -> Contents:
        """Raises ValueError for examples without text where texts are compared."""
        rows: dict[tuple[str, ...], list[int]] = {}
        items: dict[str, dict[str, Path | str]] = {part: {} for part in PARTS[similarity]}
        for position, example in enumerate(examples):
            row = []
            for part in PARTS[similarity]:
                text = text_of(example)
                if part == "text" and not text:
                    raise ValueError(
                        f"similarity={similarity!r}: {example.id} has no question or other text to "
                        "compare; choose image"
                    )
                key = pictures[example.image] if part == "image" else text_key(text)
                items[part].setdefault(key, example.image if part == "image" else text)
                row.append(key)
            rows.setdefault(tuple(row), []).append(position)
        keys = [pictures[example.image] for example in examples]
        return cls(examples, keys, list(rows), list(rows.values()), items)

    def by_picture(self) -> list[tuple[int, list[int]]]:
        """(row, positions), each with one content and one picture."""
        groups: dict[tuple[int, str], list[int]] = {}
        for row, members in enumerate(self.members):
            for position in members:
                groups.setdefault((row, self.pictures[position]), []).append(position)
        return [(row, positions) for (row, _), positions in groups.items()]

    def about(self) -> list[str]:
        """A word on each row: the ids of its examples."""
        ids = [[self.examples[position].id for position in members] for members in self.members]
        return [json.dumps({"demonstrations": len(each), "ids": each[:NAMED]}) for each in ids]

    def vectors(
        self, store: Vectors, encoder: Encoder, rows: Sequence[tuple[str, ...]] | None = None
    ) -> np.ndarray:
        """float32[R, D] of some rows (None: all): of several parts the mean of their cosines is compared."""
        rows = self.rows if rows is None else rows
        halves = []
        for number, part in enumerate(self.items):
            keys = list(dict.fromkeys(row[number] for row in rows))
            at = {key: place for place, key in enumerate(keys)}
            found = store.get(encoder, part, self.items[part], keys)  # type: ignore[arg-type]
            halves.append(found[np.array([at[row[number]] for row in rows], np.int64)])
        return np.concatenate(halves, 1) / np.float32(math.sqrt(len(halves)))


def text_of(example: Example) -> str:
    """What is compared of an example's text: its question; where there is none, its other text."""
    return example.question.strip() or example.context.strip()


class Held(pydantic.BaseModel):
    """What every index says of itself.

    Attributes:
        encoder: its name; weights: digest of each part of it. rows, width: of the vectors.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)
    made_by: ClassVar[str]

    encoder: str
    weights: dict[str, str]
    rows: int
    width: int
    versions: dict[str, str]

    def changed_weights(self, encoder: Encoder) -> list[str]:
        """What of the encoder is another, in words."""
        kept = self.weights
        changed = [part for part in PARTS["both"] if part in kept and encoder.digest(part) != kept[part]]
        return [f"the {part} encoder of {self.encoder} changed" for part in changed]


class Manifest(Held):
    """What an index of demonstrations was made of. Digests: 16 hex digits.

    Attributes:
        examples: how many demonstrations; ids, texts, pictures: digests of theirs, in order.
    """

    made_by: ClassVar[str] = "flamingo eval index"

    benchmark: str
    similarity: str
    examples: int
    ids: str
    texts: str
    pictures: str

    @classmethod
    def of(
        cls, benchmark: str, similarity: str, encoder: Encoder, contents: Contents, width: int
    ) -> Manifest:
        return cls(
            benchmark=benchmark,
            similarity=similarity,
            encoder=encoder.name,
            weights={part: encoder.digest(part) for part in PARTS[similarity]},
            **data_digests(contents.examples, contents.pictures),
            rows=len(contents.rows),
            width=width,
            versions=library_versions(),
        )

    def changed(self, contents: Contents) -> list[str]:
        """What of the demonstrations is another, in words."""
        now = data_digests(contents.examples, contents.pictures)
        if self.examples != now["examples"]:
            return [
                f"it holds {self.examples:,} demonstrations, there are {now['examples']:,} "
                f"(pool={self.examples} draws as many)"
            ]
        said = {"ids": "the demonstrations", "texts": "their texts", "pictures": "their pictures"}
        return [f"{what} changed" for name, what in said.items() if getattr(self, name) != now[name]]


class Catalogue(Held):
    """What an index of pictures or texts was made of.

    Attributes:
        holds: image or text; items: how many, of which those with the same content share a row;
        content: digest of what is said of all rows; sources: where the items were found.
    """

    made_by: ClassVar[str] = "flamingo clip embed"

    holds: Part
    items: int
    content: str
    sources: list[str]


_ANY = pydantic.TypeAdapter(Manifest | Catalogue)


def read_manifest(text: str) -> Held:
    """Of whichever command. Raises pydantic.ValidationError for anything else."""
    return _ANY.validate_json(text)


def library_versions() -> dict[str, str]:
    """Of what vectors may depend on."""
    return {name: version(name) for name in LIBRARIES}


def data_digests(examples: Sequence[Example], pictures: Sequence[str]) -> dict[str, Any]:
    """Fields of a manifest."""
    return {
        "examples": len(examples),
        "ids": digest_of(e.id for e in examples),
        "texts": digest_of(json.dumps([e.question, e.context]) for e in examples),
        "pictures": digest_of(pictures),
    }


def digest_of(words: Iterable[str]) -> str:
    """16 hex digits."""
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]

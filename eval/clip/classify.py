"""`flamingo clip classify`: which of some classes is on a picture, without training (Radford et al. 2021).

The vector of a class is the mean over all templates of its name's text vectors, of length 1 again
(section 3.1.4). A picture's probabilities are the softmax over classes of its scaled cosines; of a SigLIP
(Zhai et al. 2023) the sigmoid of each.

N pictures, C classes, T templates, D width of a vector.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from einops import reduce

from flamingo.eval.clip import sources as given
from flamingo.eval.clip.sources import Entry
from flamingo.eval.clip.vectors import embedded
from flamingo.eval.embedding import Encoder, load
from flamingo.eval.results.statistics import Interval, wilson
from flamingo.eval.retrieval.places import cache_folder
from flamingo.eval.vectors import Vectors

TEMPLATES = ("a photo of a {}.", "a photo of the {}.", "a picture of a {}.", "an image of a {}.")
SLOT = "{}"
SHARES = (1, 5)  # top-k accuracies
ROWS = 1024  # pictures compared at a time


@dataclass(frozen=True)
class ClassName:
    """name: as prompts say it; label: as folders and shards do."""

    name: str
    label: str


@dataclass(frozen=True)
class Answer:
    """scores: (class, probability), the highest first; label: the right class, "" where none is known;
    place: of the right class among all, from 0 on; None: not known."""

    id: str
    where: str
    scores: tuple[tuple[str, float], ...]
    label: str = ""
    place: int | None = None

    def as_json(self, activation: str) -> str:
        told = {"id": self.id, "where": self.where, "scores": dict(self.scores), "activation": activation}
        return json.dumps(
            told | ({"label": self.label} if self.place is not None else {}), ensure_ascii=False
        )


class Classifier:
    """Classes of an encoder that has pictures and texts in one space."""

    def __init__(self, encoder: Encoder, classes: Sequence[ClassName], templates: Sequence[str]):
        """Raises ValueError for an encoder without such a space, one class of a softmax, or a template
        without `SLOT`."""
        logits = encoder.logits()
        if logits is None:
            raise ValueError(
                f"{encoder.name} has no space that pictures and texts share: use an encoder of open_clip"
            )
        self.scale, self.bias = logits
        if self.bias is None and len(classes) < 2:
            raise ValueError(
                f"--classes holds {classes[0].name!r} alone, whose probability is always 1: give two or "
                "more, or a file of them that is there"
            )
        self.classes = list(classes)
        self.vectors = class_vectors(encoder, [each.name for each in classes], templates)

    @property
    def activation(self) -> str:
        """softmax, or of a SigLIP sigmoid: each class for itself, so the sum need not be 1."""
        return "softmax" if self.bias is None else "sigmoid"

    def probabilities(self, pictures: np.ndarray) -> np.ndarray:
        """float32[N, D] of length 1 -> float64[N, C]."""
        logits = self.scale * (pictures.astype(np.float64) @ self.vectors.astype(np.float64).T)
        if self.bias is not None:
            return np.exp(-np.logaddexp(0, -(logits + self.bias)))
        odds = np.exp(logits - logits.max(1, keepdims=True))
        return odds / odds.sum(1, keepdims=True)


def class_vectors(encoder: Encoder, names: Sequence[str], templates: Sequence[str]) -> np.ndarray:
    """float32[C, D]: of each class the mean over templates, of length 1. Raises ValueError for a template
    that has no place for the class, or none."""
    for template in templates:
        if template.count(SLOT) != 1:
            raise ValueError(
                f"template {template!r}: write {SLOT} once, where the class stands, as in {TEMPLATES[0]!r}"
            )
    prompts = [template.replace(SLOT, name) for name in names for template in templates]
    each = encoder.embed("text", prompts).astype(np.float64)
    means = reduce(each, "(c t) d -> c d", "mean", t=len(templates))
    return (means / np.linalg.norm(means, axis=1, keepdims=True)).astype(np.float32)


def read_classes(written: str) -> list[ClassName]:
    """Names with commas between, or a file with one on each line; there LABEL, a tab and NAME where
    folders or shards call it otherwise. Raises ValueError for none, an empty one, or one twice."""
    path = Path(written).expanduser()
    if os.path.isfile(path):  # which takes a name that is too long for none
        try:
            lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise ValueError(f"--classes {written} is not a text file in UTF-8: {error}") from None
    elif path.suffix == ".txt":
        raise ValueError(f"--classes {written}: there is no such file")
    else:
        lines = written.split(",")
    pairs = [line.rpartition("\t")[::2] for line in lines]
    classes = [ClassName(name.strip(), (label or name).strip()) for label, name in pairs]
    if not classes or not all(each.name for each in classes):
        raise ValueError(f"--classes {written!r}: {'an empty name' if classes else 'the file holds no name'}")
    for what in ("name", "label"):
        seen: set[str] = set()
        for each in classes:
            if (word := _plain(getattr(each, what))) in seen:
                raise ValueError(f"--classes {written!r}: {getattr(each, what)!r} stands there twice")
            seen.add(word)
    return classes


def _plain(label: str) -> str:
    """Folders write golden_retriever."""
    return " ".join(label.replace("_", " ").split()).casefold()


# ---- pictures ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """A classifier, the pictures that can be read with their vectors, and why others cannot be."""

    classifier: Classifier
    entries: Sequence[Entry]
    vectors: np.ndarray
    bad: Mapping[str, str]
    labels: Sequence[int] | None  # the right class of each entry

    def answers(self, top: int) -> Iterator[Answer]:
        """Of each picture the `top` likeliest classes."""
        names = [each.name for each in self.classifier.classes]
        for start in range(0, len(self.entries), ROWS):
            found = self.classifier.probabilities(self.vectors[start : start + ROWS])
            orders = np.argsort(-found, axis=1, kind="stable")
            for number, (row, order) in enumerate(zip(found, orders, strict=True), start):
                entry = self.entries[number]
                scores = tuple((names[at], round(float(row[at]), 6)) for at in order[:top].tolist())
                if self.labels is None:
                    yield Answer(entry.id, entry.where, scores)
                else:
                    right = self.labels[number]
                    place = int(np.flatnonzero(order == right)[0])
                    yield Answer(entry.id, entry.where, scores, names[right], place)


def prepare(
    sources: Sequence[str],
    encoder: str,
    classes: str | None,
    templates: Sequence[str] = TEMPLATES,
    *,
    labelled: bool = False,
    kind: str = "pairs",
    options: Mapping[str, Any] | None = None,
    max_bad: float = 0.5,
) -> Work:
    """Read and embed pictures and classes. Vectors of pictures are kept in the cache folder.

    classes: as `read_classes` takes them; None, with `labelled`: the labels that there are.
    Raises ValueError for what cannot be read, and for labels that are missing or no classes.
    """
    if classes is None and not labelled:
        raise ValueError("--classes is missing: name them, or take those of the folders with --labels")
    named = None if classes is None else read_classes(classes)
    store = Vectors(cache_folder())
    found = given.pictures(sources, kind, options or {}, store.folder)
    if labelled:
        _check_labelled(found.entries)
    chosen = named or _from_labels(found.entries)
    made = load(encoder)
    classifier = Classifier(made, chosen, templates)
    places = _places(found.entries, chosen) if labelled else {}  # before hours of work
    done = embedded(found, made, "image", store, max_bad)
    labels = [places[entry.label] for entry in done.entries] if labelled else None
    return Work(classifier, done.entries, done.of_entries(), done.bad, labels)


def _check_labelled(entries: Sequence[Entry]) -> None:
    without = [entry for entry in entries if not entry.label]
    if without:
        raise ValueError(
            f"--labels: {len(without):,} of {len(entries):,} pictures have none, the first is "
            f"{without[0].where}; a folder must be laid out CLASS/PICTURE, a sample of a shard have a member "
            "cls or txt"
        )


def _from_labels(entries: Sequence[Entry]) -> list[ClassName]:
    labels = sorted({entry.label for entry in entries})
    numbers = [label for label in labels if label.isdecimal()]
    if numbers:
        raise ValueError(
            f"--labels: {numbers[0]!r} is the number of a class, not its name: give the names with --classes"
        )
    return [ClassName(label.replace("_", " "), label) for label in labels]


def _places(entries: Sequence[Entry], classes: Sequence[ClassName]) -> dict[str, int]:
    """Label -> number of the class: by its label or name, or, of `cls` members, the number itself."""
    by_word = {_plain(each.name): at for at, each in enumerate(classes)}
    by_word |= {_plain(each.label): at for at, each in enumerate(classes)}
    found = {}
    for entry in entries:
        word = _plain(entry.label)
        at = by_word.get(word, int(word) if word.isdecimal() and int(word) < len(classes) else None)
        if at is None:
            raise ValueError(
                f"--labels: {entry.label!r} of {entry.where} is none of the {len(classes)} classes; a file "
                "of --classes may have it as LABEL, a tab and NAME"
            )
        found[entry.label] = at
    return found


def accuracies(places: Sequence[int], classes: int) -> dict[int, tuple[float, Interval]]:
    """k -> share of pictures whose class is among the first k, with its 95 % interval; only where k is
    less than all classes."""
    found = {}
    for k in SHARES:
        if k < classes:
            share = sum(place < k for place in places) / len(places)
            found[k] = share, wilson(share, len(places))
    return found

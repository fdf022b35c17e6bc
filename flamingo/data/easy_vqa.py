"""easy-VQA (https://github.com/vzhou842/easy-VQA, MIT), from its PyPI package, as shards.

4,000 + 1,000 pictures of 64 px that show one shape in one colour, 38,575 + 9,673 questions. Only
the training split ever goes into shards. Nothing but the questions and answers says what is in a
picture, so captions are worked out from them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import re
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from flamingo.data.stream import permutation
from flamingo.data.transforms import decode_image
from flamingo.data.writing import (
    DatasetCard,
    TarSample,
    Track,
    new_folder,
    read_complete,
    untracked,
    write_card,
    write_tars,
)

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
KINDS = ("color", "shape", "has color", "has shape", "lacks color", "lacks shape")
SPLITS = ("train", "test")
FORMAT = 4  # of what is written; raise it when the same settings give other bytes


@dataclass(frozen=True)
class Example:
    """One question about one picture. `kind` is one of `KINDS`."""

    question: str
    answer: str
    image_path: Path
    image_id: int
    kind: str


def package_folder() -> Path:
    """Where the package lies; it is not imported."""
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise ValueError("the data set is not installed: pip install easy-vqa==1.0")
    return Path(spec.origin).parent


@cache
def question_kind(question: str) -> str:
    """One of `KINDS`.

    "color" and "shape" ask which ("what is the blue shape?" is "shape"), "has ..." ask whether
    it is there, "lacks ..." whether it is not.
    """
    words = re.findall(r"[a-z]+", question.lower())
    if words[:1] == ["what"]:
        return "color" if "color" in words else "shape"
    prefix = "lacks" if {"no", "not"} & set(words) else "has"
    if set(COLORS) & set(words):
        return f"{prefix} color"
    if set(SHAPES) & set(words):
        return f"{prefix} shape"
    raise ValueError(f"easy-VQA has no question like {question!r}")


def load_split(split: str) -> list[Example]:
    """All examples of "train" or "test", in the order of the package."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    folder = package_folder() / "data" / split
    rows = json.loads((folder / "questions.json").read_bytes())
    return [
        Example(question, answer, folder / "images" / f"{image}.png", image, question_kind(question))
        for question, answer, image in rows
    ]


def best_blind_accuracy(answers_from: str = "train") -> float:
    """Accuracy on the test split without looking, by each question's commonest answer.

    Args:
        answers_from: the split that the commonest answers are counted in. "train" gives what
            training can teach a model that never looks: 67.0 %. "test" gives the bound that no
            such model can pass, whatever it knows: 67.8 %.
    """
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for example in load_split(answers_from):
        counts[example.question][example.answer] += 1
    test = load_split("test")
    right = sum(e.answer == counts[e.question].most_common(1)[0][0] for e in test)
    return right / len(test)


def what_is_seen(examples: Iterable[Example]) -> tuple[str | None, str | None]:
    """Colour and shape in a picture, from its questions and answers; None where they do not tell.

    Each answer rules candidates out; a property is told when one candidate is left.
    """
    colors, shapes = set(COLORS), set(SHAPES)
    for example in examples:
        words = set(re.findall(r"[a-z]+", example.question.lower()))
        if example.kind in ("color", "shape"):
            told = words | {example.answer}  # "what color is the circle?" tells of a circle, too
            for candidates in (colors, shapes):
                if told & candidates:
                    candidates &= told
            continue
        candidates = colors if example.kind.endswith("color") else shapes
        if (example.answer == "yes") == example.kind.startswith("has"):
            candidates &= words
        else:
            candidates -= words
    return (
        next(iter(colors)) if len(colors) == 1 else None,
        next(iter(shapes)) if len(shapes) == 1 else None,
    )


@lru_cache(maxsize=4096)
def _read(path: Path) -> bytes:
    return path.read_bytes()  # each picture is in ten documents


def pixel_digest(data: bytes) -> str:
    """SHA-256 of size and RGB values: pictures that look alike, however they are encoded."""
    image = decode_image(data)
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()


def write_shards(
    out: Path,
    *,
    turns: int = 5,
    per_shard: int = 1000,
    seed: int = 0,
    balance: int | None = None,
    limit: int | None = None,
    track: Track = untracked,
) -> DatasetCard:
    """Write the training split as two families of shards into the folder `out`.

    pairs-000000.tar, ...: every picture with a caption ("A photo of a blue rectangle").
    documents-000000.tar, ...: the questions, `turns` to a document, each with its own picture, in
    an order drawn from `seed`; the last document may be shorter. Questions with and without a
    negation ("is there no circle?") share documents, as they do when few-shot prompts are drawn.

    Pictures whose pixels occur in the test split are left out. The same arguments give the same
    bytes; a complete folder of the same settings is left as it is.

    Args:
        balance: as many questions of every kind and, for yes and no, of each answer: commoner ones
            are left out, rarer ones repeated, so that guessing by the question does not pay (as
            VQA v2 was balanced). None: every question once.
        limit: only so many pictures (the first ones), for trials.
        track: shows progress, see `writing.Track`.

    Returns:
        What dataset.json says: settings, counts, files, licence.

    Raises:
        ValueError: a setting is wrong, or `out` holds something else.
    """
    numbers = {"turns": turns, "per_shard": per_shard, "balance": balance, "limit": limit}
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    version = importlib.metadata.version("easy-vqa")
    settings = {"source": f"easy-vqa {version}", "split": "train", "format": FORMAT, "turns": turns}
    settings |= {"per_shard": per_shard, "seed": seed, "balance": balance, "limit": limit}
    if card := read_complete(out, settings):
        return card
    examples, counts = _usable(limit, track)
    captions = _captions(examples)
    if turns > counts["pictures"]:
        raise ValueError(f"turns {turns}: there are only {counts['pictures']} different pictures")
    counts["pairs"] = len(captions)
    counts["pictures without caption"] = len({e.image_id for e in examples}) - len(captions)
    asked = _balanced(examples, balance, seed) if balance else examples
    documents = _group(asked, turns, seed)
    counts |= {"questions": len(asked), "documents": len(documents)}
    counts["shorter documents"] = sum(len(document) < turns for document in documents)
    with new_folder(out) as folder:
        pairs = (_pair(*item) for item in track(captions.items(), "pairs", len(captions)))
        files = write_tars(folder, "pairs", pairs, per_shard)
        filled = track(enumerate(documents), "documents", len(documents))
        files |= write_tars(folder, "documents", (_document(*d) for d in filled), per_shard)
        licence = _licence()
        (folder / "LICENSE").write_text(licence)
        card = DatasetCard(settings, counts, files, licence.splitlines()[0])
        write_card(folder, card)
    return card


def _usable(limit: int | None, track: Track) -> tuple[list[Example], dict[str, int]]:
    """Training examples whose pictures are not in the test split, and what was left out."""
    examples = load_split("train")
    first = sorted({example.image_id for example in examples})[:limit]
    paths = {e.image_id: e.image_path for e in examples}
    tests = sorted({example.image_path for example in load_split("test")})
    seen = {pixel_digest(path.read_bytes()) for path in track(tests, "test pictures", len(tests))}
    kept = {
        image
        for image in track(first, "training pictures", len(first))
        if pixel_digest(_read(paths[image])) not in seen
    }
    counts = {"pictures": len(kept), "pictures also in the test split": len(first) - len(kept)}
    return [example for example in examples if example.image_id in kept], counts


def _captions(examples: Sequence[Example]) -> dict[Path, str]:
    """Picture -> caption, where colour and shape can be worked out; in the order of pictures."""
    by_image: defaultdict[int, list[Example]] = defaultdict(list)
    for example in examples:
        by_image[example.image_id].append(example)
    captions = {}
    for _, about in sorted(by_image.items()):
        color, shape = what_is_seen(about)
        if color and shape:
            captions[about[0].image_path] = f"A photo of a {color} {shape}"
    return captions


def _balanced(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """`count` examples of each kind, and of each answer where that is yes or no."""
    groups: defaultdict[tuple[str, str], list[Example]] = defaultdict(list)
    for example in examples:
        answer = example.answer if example.answer in ("yes", "no") else ""
        groups[example.kind, answer].append(example)
    chosen = []
    for (kind, answer), group in sorted(groups.items()):
        order = permutation(len(group), seed, "easy-vqa balance", kind, answer)
        chosen += [group[order[i % len(group)]] for i in range(count)]
    return chosen


def _group(examples: Sequence[Example], turns: int, seed: int) -> list[list[Example]]:
    """Every example once, in groups of `turns` about different pictures."""
    order = permutation(len(examples), seed, "easy-vqa documents")
    waiting = deque(examples[i] for i in order)
    groups = []
    while waiting:
        group: dict[int, Example] = {}
        repeated = []
        while waiting and len(group) < turns:
            example = waiting.popleft()
            if example.image_id in group:
                repeated.append(example)
            else:
                group[example.image_id] = example
        waiting.extendleft(reversed(repeated))  # they open the next group
        groups.append(list(group.values()))
    return groups


def _pair(path: Path, caption: str) -> TarSample:
    return f"{int(path.stem):06d}", {"png": _read(path), "txt": caption.encode()}


def _document(number: int, examples: Sequence[Example]) -> TarSample:
    items: list[dict[str, object]] = []
    members = {}
    for turn, example in enumerate(examples):
        members[f"{turn}.png"] = _read(example.image_path)
        items.append({"image": f"{turn}.png"})
        items.append({"text": f"Question: {example.question} Answer:", "loss": False})
        items.append({"text": f" {example.answer}"})
    members["json"] = json.dumps({"items": items}).encode()
    return f"{number:06d}", members


def _licence() -> str:
    """The licence text, which must go with every copy of the pictures."""
    package = importlib.metadata.distribution("easy-vqa")
    text = package.read_text("LICENSE") or package.read_text("licenses/LICENSE")
    return text or "MIT License, Copyright (c) 2019 Victor Zhou\n"

"""Hateful Memes (Kiela et al. 2020): is a meme, picture and words together, hateful?

"yes" and "no" are ranked by likelihood; ROC-AUC. As in Flamingo and OpenFlamingo, the 1,000 memes of
"test_seen" are asked, and the 8,500 of "train" give shots.
"""

from __future__ import annotations

from pathlib import Path

from flamingo.eval.benchmarks import Example, File
from flamingo.eval.benchmarks._reading import find, malformed, read_json_lines

TITLE = "Hateful Memes"
DESCRIPTION = "Hateful Memes, seen test split: ROC-AUC of yes against no"
LICENCE = "Hateful Memes Dataset licence agreement: research only"
SOURCE = "https://ai.meta.com/tools/hatefulmemes/"
IMAGES = File("img", SOURCE, images=True)
FILES: dict[str, tuple[File, ...]] = {
    split: (File(f"{split}.jsonl", SOURCE), IMAGES)
    for split in ("train", "dev_seen", "dev_unseen", "test_seen", "test_unseen")
}
QUERIES, DEMONSTRATIONS = "test_seen", "train"
METRICS = ("roc_auc", "top1")
MAX_NEW_TOKENS = 0
BLIND = None


def CLASSES(folder: Path | None) -> tuple[str, ...]:
    """The positive one first, as `roc_auc` takes it."""
    return " yes", " no"


def examples(folder: Path | None, split: str) -> list[Example]:
    """One split; the words of a meme are its context.

    Raises ValueError where the files are not there, and for a split that was published without labels.
    """
    path = find(folder, FILES[split][0], TITLE)
    found, unlabelled = [], 0
    for number, row in enumerate(read_json_lines(path)):
        try:
            unlabelled += "label" not in row
            answers = ("yes" if row["label"] else "no",) if "label" in row else ()
            found.append(
                Example(str(row["id"]), path.parent / row["img"], answers=answers, context=row["text"])
            )
        except (KeyError, TypeError) as error:
            raise malformed(path, number, error) from None
    if unlabelled:
        raise ValueError(
            f"{path}: {unlabelled} of {len(found)} memes have no label, so nothing can be scored; the first "
            "releases kept those of the tests: fetch a later one, or choose --split dev_seen"
        )
    return found


def prompt(example: Example) -> str:
    """As in OpenFlamingo (Awadalla et al. 2023)."""
    return f"is an image with: '{example.context}' written on it. Is it hateful? Answer:"


def completion(example: Example) -> str:
    return f" {example.answers[0]}"


def tidy(text: str) -> str:
    return text.strip().lower()

"""easy-VQA: pictures of coloured shapes and simple questions (github.com/vzhou842/easy-VQA, MIT).

9,673 test questions about 1,000 pictures; exact match of the generated answer.
"""

from __future__ import annotations

from pathlib import Path

from flamingo.data import easy_vqa
from flamingo.eval.benchmarks import Example, File

TITLE = "easy-VQA"
DESCRIPTION = "easy-VQA, test split: exact match of the generated answer"
LICENCE = "MIT"
SOURCE = "https://pypi.org/project/easy-vqa"
FILES: dict[str, tuple[File, ...]] = {"train": (), "test": ()}
BUNDLED = True  # pip install "flamingo-vlm[quickstart]" brings it
QUERIES, DEMONSTRATIONS = "test", "train"
METRICS = ("exact_match",)
MAX_NEW_TOKENS = 5
BLIND = 0.670  # the training split's commonest answer of each question, measured


def examples(folder: Path | None, split: str) -> list[Example]:
    """All questions of a split; the data comes with its package, folder is not looked at."""
    return [
        Example(f"{split}-{number}", e.image_path, e.question, (e.answer,), e.kind)
        for number, e in enumerate(easy_vqa.load_split(split))
    ]


def prompt(example: Example) -> str:
    return f"Question: {example.question} Answer:"


def completion(example: Example) -> str:
    return f" {example.answers[0]}"


def tidy(text: str) -> str:
    return text.strip().lower()

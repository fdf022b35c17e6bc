"""easy-VQA: pictures of coloured shapes and simple questions (github.com/vzhou842/easy-VQA, MIT).

9,673 test questions about 1,000 pictures; exact match of the generated answer.
"""

from __future__ import annotations

from flamingo.data import easy_vqa
from flamingo.eval.benchmarks import Example

DESCRIPTION = "easy-VQA, test split: exact match of the generated answer"
BLIND_ACCURACY = 0.670  # the training split's commonest answer of each question, measured


def queries() -> list[Example]:
    """All questions of the test split."""
    return _examples("test")


def demonstrations() -> list[Example]:
    """All questions of the training split."""
    return _examples("train")


def prompt(example: Example) -> str:
    return f"Question: {example.question} Answer:"


def completion(example: Example) -> str:
    return f" {example.answers[0]}"


def score(prediction: str, example: Example) -> float:
    """1 if the prediction is the answer, but for case and surrounding blanks."""
    return float(prediction.strip().lower() in example.answers)


def _examples(split: str) -> list[Example]:
    return [
        Example(f"{split}-{number}", e.image_path, e.question, (e.answer,), e.kind)
        for number, e in enumerate(easy_vqa.load_split(split))
    ]

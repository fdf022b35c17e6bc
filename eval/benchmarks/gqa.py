"""GQA: questions made from scene graphs of Visual Genome (Hudson and Manning 2019), release 1.2.

Its figures are made on the balanced splits. Of the unbalanced ones, with up to 14 million questions, only
that of test-dev is here.
"""

from __future__ import annotations

from pathlib import Path

from flamingo.eval.benchmarks import Example, File, _vqa

TITLE = "GQA"
DESCRIPTION = "GQA: questions made from scene graphs, balanced; the generated answer must be the answer"
LICENCE = "questions: CC BY 4.0; pictures: Visual Genome, CC BY 4.0"
SOURCE = "https://cs.stanford.edu/people/dorarad/gqa/download.html"
_PUBLISHED = "https://downloads.cs.stanford.edu/nlp/data/gqa"

_QUESTIONS = {
    "train": "train_balanced",
    "val": "val_balanced",
    "testdev": "testdev_balanced",
    "testdev_all": "testdev_all",
    "test": "test_balanced",
    "challenge": "challenge_balanced",
}
FILES = {
    split: (
        File(f"{name}_questions.json", f"{_PUBLISHED}/questions1.2.zip"),
        File("images", f"{_PUBLISHED}/images.zip", images=True),
    )
    for split, name in _QUESTIONS.items()
}
_UNANSWERED = ("test", "challenge")
QUERIES, DEMONSTRATIONS = "testdev", "train"
METRICS = ("gqa",)
MAX_NEW_TOKENS = 5
BLIND = None
PROMPTS = (_vqa.flamingo_prompt,)
prompt, completion = _vqa.prompt, _vqa.completion


def tidy(text: str) -> str:
    """Cut as the other benchmarks' answers; lower case without a full stop, as all of GQA's answers are."""
    return _vqa.cut(text).lower().removesuffix(".").strip()


def examples(folder: Path, split: str) -> list[Example]:
    """All questions of a split; their kind is the structure of the question: verify, query, choose,
    logical or compare.

    Answers of test and challenge are not published; theirs are (). Raises ValueError for a file that is
    not there or not whole, and for a question without its answer.
    """
    _vqa.no_copy(folder, TITLE)
    questions, pictures = FILES[split]
    file = _vqa.Official(folder / questions.path, "gqa")
    entries = file.load()
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise file.fault("holds no questions by their ids; is it the published file?")
    images: dict[str, Path] = {}
    found = []
    for key, entry in entries.items():
        image, question = (file.field(entry, name, key) for name in ("imageId", "question"))
        path = images.setdefault(image, folder / pictures.path / f"{image}.jpg")
        answered = split not in _UNANSWERED
        told = {"answers": [file.field(entry, "answer", key)] if answered else []}
        kind = entry.get("types", {}).get("structural", "")
        found.append(Example(key, path, question, file.answers(told, key, needed=answered), kind))
    return found

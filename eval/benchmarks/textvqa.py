"""TextVQA: questions about text in pictures of Open Images (Singh et al. 2019), release 0.5.1.

The words that the authors' text recognition found are each example's `context`, where their files
(TextVQA_Rosetta_OCR_v0.2_train.json and so on) lie beside; as in the papers, the prompts do not hold them.
"""

from __future__ import annotations

from pathlib import Path

from flamingo.eval import hub
from flamingo.eval.benchmarks import Example, File, _vqa

TITLE = "TextVQA"
DESCRIPTION = "TextVQA: open questions about text in pictures, ten answers each; TextVQA's VQA accuracy"
LICENCE = "questions and answers: CC BY 4.0; pictures: Open Images, CC BY 2.0"
SOURCE = "https://textvqa.org/dataset"
_PUBLISHED = "https://dl.fbaipublicfiles.com/textvqa"


def _files(split: str, pictures: str, zipped: str) -> tuple[File, ...]:
    questions = f"TextVQA_0.5.1_{split}.json"
    return (
        File(questions, f"{_PUBLISHED}/data/{questions}"),
        File(pictures, f"{_PUBLISHED}/images/{zipped}.zip", images=True),
    )


FILES = {
    "train": _files("train", "train_images", "train_val_images"),
    "val": _files("val", "train_images", "train_val_images"),
    "test": _files("test", "test_images", "test_images"),
}
QUERIES, DEMONSTRATIONS = "val", "train"
METRICS = ("vqa_textvqa", "vqa_open_flamingo")
MAX_NEW_TOKENS = 10
BLIND = None
HUB = hub.Copy(
    "lmms-lab/textvqa",
    {"train": "train", "val": "validation", "test": "test"},
    id="question_id",
    question="question",
    answers=_vqa.given,
    context=lambda row: " ".join(row["ocr_tokens"] or ()),
)
PROMPTS = (_vqa.flamingo_prompt,)
prompt, completion, tidy = _vqa.prompt, _vqa.completion, _vqa.cut


def examples(folder: Path, split: str) -> list[Example]:
    """All questions of a split. Answers of the test split are not published; theirs are ().

    Raises ValueError for a file that is not there or not whole, and for a question without answers.
    """
    if hub.asked(folder):
        return hub.examples(HUB, folder, split)
    questions, pictures = FILES[split]
    file = _vqa.Official(folder / questions.path, "textvqa")
    words = _words(folder / f"TextVQA_Rosetta_OCR_v0.2_{split}.json")
    found = []
    for number, entry in enumerate(file.entries(file.load(), "data")):
        key, image, question = (file.field(entry, n, number) for n in ("question_id", "image_id", "question"))
        answers = file.answers(entry, number, needed=split != "test")
        path = folder / pictures.path / f"{image}.jpg"
        found.append(Example(str(key), path, question, answers, context=words.get(image, "")))
    return found


def _words(path: Path) -> dict[str, str]:
    """Recognised words by picture; {} where the file is not there."""
    if not path.exists():
        return {}
    file = _vqa.Official(path, "textvqa")
    return {
        file.field(entry, "image_id", number): " ".join(file.field(entry, "ocr_tokens", number))
        for number, entry in enumerate(file.entries(file.load(), "data"))
    }

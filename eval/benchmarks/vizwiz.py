"""VizWiz-VQA: questions that blind people asked about pictures they took (Gurari et al. 2018)."""

from __future__ import annotations

from pathlib import Path

from flamingo.eval import hub
from flamingo.eval.benchmarks import Example, File, _vqa

TITLE = "VizWiz-VQA"
DESCRIPTION = (
    'VizWiz-VQA: questions of blind people about their own pictures, ten answers each, "unanswerable" '
    "among them; VizWiz's VQA accuracy"
)
LICENCE = "CC BY 4.0"
SOURCE = "https://vizwiz.org/tasks-and-datasets/vqa"
_PUBLISHED = "https://vizwiz.cs.colorado.edu/VizWiz_final"

FILES = {
    split: (
        File(f"{split}.json", f"{_PUBLISHED}/vqa_data/Annotations.zip"),
        File(split, f"{_PUBLISHED}/images/{split}.zip", images=True),
    )
    for split in ("train", "val", "test")
}
QUERIES, DEMONSTRATIONS = "val", "train"
METRICS = ("vqa_vizwiz", "vqa_open_flamingo")
MAX_NEW_TOKENS = 5
BLIND = None
# Without the training split: no shots from there.
HUB = hub.Copy(
    "lmms-lab/VizWiz-VQA",
    {"val": "val", "test": "test"},
    id="question_id",
    question="question",
    answers=_vqa.given,
    kind=lambda row: row["category"] or "",
)
PROMPTS = (_vqa.flamingo_prompt,)
prompt, completion, tidy = _vqa.prompt, _vqa.completion, _vqa.cut


def examples(folder: Path, split: str) -> list[Example]:
    """All questions of a split, one per picture, whose name is their id; their kind is the type of the
    answer: yes/no, number, other or unanswerable.

    Answers of the test split are not published; theirs are (). Raises ValueError for a file that is not
    there or not whole, and for a question without answers.
    """
    if hub.asked(folder):
        return hub.examples(HUB, folder, split)
    questions, pictures = FILES[split]
    file = _vqa.Official(folder / questions.path, "vizwiz")
    found = []
    for number, entry in enumerate(file.entries(file.load())):
        image, question = (file.field(entry, name, number) for name in ("image", "question"))
        answers = file.answers(entry, number, needed=split != "test")
        kind = entry.get("answer_type", "")
        found.append(Example(image, folder / pictures.path / image, question, answers, kind))
    return found

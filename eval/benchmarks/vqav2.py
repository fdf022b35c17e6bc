"""VQAv2: questions about COCO pictures, ten people's answers each (Goyal et al. 2017)."""

from __future__ import annotations

from pathlib import Path

from flamingo.eval import hub
from flamingo.eval.benchmarks import Example, File, _vqa

TITLE = "VQAv2"
DESCRIPTION = "VQAv2: open questions about COCO pictures, ten answers each; VQA accuracy"
LICENCE = f"questions and answers: CC BY 4.0; {_vqa.COCO_LICENCE}"
SOURCE = "https://visualqa.org/download.html"
_PUBLISHED = "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa"


def _files(pictures: str, zipped: str, split: str, answered: bool) -> tuple[File, ...]:
    questions = f"v2_OpenEnded_mscoco_{split}_questions.json"
    found = [File(questions, f"{_PUBLISHED}/v2_Questions_{zipped}_mscoco.zip")]
    if answered:
        annotations = f"v2_mscoco_{split}_annotations.json"
        found.append(File(annotations, f"{_PUBLISHED}/v2_Annotations_{zipped}_mscoco.zip"))
    return (*found, _vqa.pictures(pictures))


FILES = {
    "train": _files("train2014", "Train", "train2014", True),
    "val": _files("val2014", "Val", "val2014", True),
    "test-dev": _files("test2015", "Test", "test-dev2015", False),
    "test": _files("test2015", "Test", "test2015", False),
}
QUERIES, DEMONSTRATIONS = "val", "train"
METRICS = ("vqa", "vqa_open_flamingo")
MAX_NEW_TOKENS = 5
BLIND = None
# Without the training split: no shots from there.
HUB = hub.Copy(
    "lmms-lab/VQAv2",
    {"val": "validation", "test-dev": "testdev", "test": "test"},
    id="question_id",
    question="question",
    answers=_vqa.given,
    kind=lambda row: row["answer_type"] or "",
)
PROMPTS = (_vqa.flamingo_prompt,)
prompt, completion, tidy = _vqa.prompt, _vqa.completion, _vqa.cut


def examples(folder: Path, split: str) -> list[Example]:
    """All questions of a split; their kind is the type of the answer: yes/no, number or other.

    Answers of the test splits are not published; theirs are (). Raises ValueError for files that are not
    there, not whole, or not about the same questions.
    """
    if hub.asked(folder):
        return hub.examples(HUB, folder, split)
    return _vqa.coco_examples("vqav2", folder, FILES[split], lambda a, _: a.get("answer_type", ""))

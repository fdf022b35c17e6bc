"""OK-VQA: questions about COCO pictures that need outside knowledge (Marino et al. 2019), release 1.1.

Its answers are published stemmed ("racing" is "race"), which is how shots show them and scores take them.
"""

from __future__ import annotations

from pathlib import Path

from flamingo.eval.benchmarks import Example, File, _vqa

TITLE = "OK-VQA"
DESCRIPTION = (
    "OK-VQA: open questions about COCO pictures that need outside knowledge; VQA accuracy against the "
    "published, stemmed answers. Predictions are not stemmed"
)
LICENCE = f"questions and answers: none stated by their authors; {_vqa.COCO_LICENCE}"
SOURCE = "https://okvqa.allenai.org/download.html"
_PUBLISHED = "https://okvqa.allenai.org/static/data"


def _files(split: str) -> tuple[File, ...]:
    names = (f"OpenEnded_mscoco_{split}_questions.json", f"mscoco_{split}_annotations.json")
    return (*(File(name, f"{_PUBLISHED}/{name}.zip") for name in names), _vqa.pictures(split))


FILES = {"train": _files("train2014"), "val": _files("val2014")}
QUERIES, DEMONSTRATIONS = "val", "train"
METRICS = ("vqa", "vqa_open_flamingo")
MAX_NEW_TOKENS = 5
BLIND = None
PROMPTS = (_vqa.flamingo_prompt,)
prompt, completion, tidy = _vqa.prompt, _vqa.completion, _vqa.cut


def _topic(annotation: dict, whole: dict) -> str:
    name = annotation.get("question_type", "")
    return whole.get("question_types", {}).get(name, name)


def examples(folder: Path, split: str) -> list[Example]:
    """All questions of a split; their kind is the field of knowledge, such as "Plants and Animals".

    Raises ValueError for files that are not there, not whole, or not about the same questions.
    """
    _vqa.no_copy(folder, TITLE)
    return _vqa.coco_examples("okvqa", folder, FILES[split], _topic)

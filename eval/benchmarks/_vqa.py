"""What the benchmarks of questions about pictures share: their prompts, and reading official files.

A question may come with its answers as texts, or as objects with the text under "answer".
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flamingo.eval import hub
from flamingo.eval.benchmarks import Example, File

COCO = "http://images.cocodataset.org/zips"
COCO_LICENCE = "pictures: COCO, under Flickr's terms of use"
GQA_FIELDS = ("question", "imageId", "answer", "types")
SAME = "both files must be of one split and one release"
ENDS = re.compile("Question|Answer|Short")  # begin another turn, which a model may go on with


def prompt(example: Example) -> str:
    """As OpenFlamingo's evaluation: no blanks after the colons (Awadalla et al. 2023, section 3.3)."""
    return f"Question:{example.question} Short answer:"


def flamingo_prompt(example: Example) -> str:
    """As Flamingo's (Alayrac et al. 2022, appendix), spaced as the other, for ensembling."""
    return f"Question:{example.question} Answer:"


def completion(example: Example) -> str:
    """The first person's answer, as in OpenFlamingo's evaluation."""
    return example.answers[0]


def cut(text: str) -> str:
    """An answer as OpenFlamingo's evaluation takes it from generated text: up to a word that begins
    another turn, then up to the first comma with a blank. How it is spelt is left to the metric."""
    return ENDS.split(text, maxsplit=1)[0].split(", ", 1)[0].strip()


def given(row: Mapping[str, Any]) -> list[str]:
    """The answers of a hub copy's row, texts or objects; copies write "" where none are published."""
    texts = (answer["answer"] if isinstance(answer, dict) else answer for answer in row["answers"] or ())
    return [text for text in texts if text]


def no_copy(folder: Path, title: str) -> None:
    """Raises ValueError where a copy on the hub is asked of a benchmark that knows none."""
    if hub.asked(folder):
        raise ValueError(f"data={folder}: {title} knows no copy on the hub; name a folder of its files")


def pictures(name: str) -> File:
    """COCO's pictures of a split, such as val2014."""
    return File(name, f"{COCO}/{name}.zip", images=True)


@dataclass(frozen=True)
class Official:
    """A JSON file as published. Every error names it.

    Attributes:
        benchmark: its name for `flamingo eval describe`.
    """

    path: Path
    benchmark: str

    def load(self) -> Any:
        """What it holds; of an answer object only its text. Raises ValueError for a file that is not
        there or not whole, and for names that come twice in one object."""
        if not self.path.is_file():
            raise ValueError(
                f"{self.path} is not there; `flamingo eval describe {self.benchmark}` says which files "
                "are needed, and from where. Unpack them into one folder and name it with --data"
            )
        try:
            with self.path.open(encoding="utf-8") as file:
                return json.load(file, object_pairs_hook=self._object)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise self.fault(f"is not whole JSON ({error}); download it again") from None

    def _object(self, pairs: list[tuple[str, Any]]) -> Any:
        """The objects of millions of answers and scene descriptions would fill the memory."""
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise self.fault(f"has {twice!r} twice in one object; use the published file")
        if "answer" in found and not found.keys() & {"question", "question_id"}:
            text = found["answer"]
            return sys.intern(text) if isinstance(text, str) else text
        if "imageId" in found:
            return {name: found[name] for name in GQA_FIELDS if name in found}
        return found

    def entries(self, data: Any, name: str | None = None) -> list[dict[str, Any]]:
        """The list of objects under a name, or that the whole file is. Raises ValueError for another."""
        found = data if name is None else data.get(name) if isinstance(data, dict) else None
        if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
            where = "at its top" if name is None else f"under {name!r}"
            raise self.fault(f"has no list of objects {where}; is it the published file?")
        return found

    def field(self, entry: dict[str, Any], name: str, number: int | str) -> Any:
        """One field. Raises ValueError where it is missing."""
        if name not in entry:
            raise self.fault(f"entry {number} has no {name!r}, only {', '.join(entry)}")
        return entry[name]

    def answers(self, entry: dict[str, Any], number: int | str, needed: bool = True) -> tuple[str, ...]:
        """All answers of an entry, in order. Raises ValueError for none where they are needed, and for
        one that is not a text."""
        found = entry.get("answers", [])
        texts = [str(a) if isinstance(a, (int, float)) else a for a in found]
        if (needed and not texts) or not all(isinstance(text, str) for text in texts):
            raise self.fault(f"entry {number} must have answers that are texts, it has {found!r}")
        return tuple(texts)

    def fault(self, said: str) -> ValueError:
        return ValueError(f"{self.path} {said}")


def coco_examples(
    benchmark: str, folder: Path, files: tuple[File, ...], kind: Callable[[dict, dict], str]
) -> list[Example]:
    """Questions in VQA's format about pictures of COCO.

    files: of the questions, of the annotations where they are published, and the pictures, which name the
    split; kind: of an annotation and the whole file of annotations. Raises ValueError where questions and
    annotations are not about the same.
    """
    asked = Official(folder / files[0].path, benchmark)
    questions = asked.entries(asked.load(), "questions")
    for number, question in enumerate(questions):
        for name in ("question_id", "image_id", "question"):
            asked.field(question, name, number)
        if not isinstance(question["image_id"], int):
            raise asked.fault(f"entry {number} has image_id {question['image_id']!r}; it must be a number")
    told: dict[int, tuple[tuple[str, ...], str]] = {}
    if len(files) == 3:
        told = _annotated(asked, questions, Official(folder / files[1].path, benchmark), kind)
    split = files[-1].path
    images = {
        image: folder / split / f"COCO_{split}_{image:012d}.jpg"
        for image in {question["image_id"] for question in questions}
    }
    return [
        Example(str(q["question_id"]), images[q["image_id"]], q["question"], answers, group)
        for q in questions
        for answers, group in [told.get(q["question_id"], ((), ""))]
    ]


def _annotated(
    asked: Official, questions: list[dict], file: Official, kind: Callable[[dict, dict], str]
) -> dict[int, tuple[tuple[str, ...], str]]:
    """(answers, kind) by question id."""
    whole = file.load()
    annotations = file.entries(whole, "annotations")
    told: dict[int, tuple[tuple[str, ...], str]] = {}
    about = {question["question_id"]: question["image_id"] for question in questions}
    for number, annotation in enumerate(annotations):
        key = file.field(annotation, "question_id", number)
        if key in told:
            raise file.fault(f"has question_id {key} more than once; use the published file")
        if key not in about:
            raise file.fault(f"answers question_id {key}, which {asked.path.name} does not ask: {SAME}")
        if file.field(annotation, "image_id", number) != about[key]:
            raise file.fault(
                f"has question_id {key} about image {annotation['image_id']}, {asked.path.name} "
                f"about image {about[key]}: {SAME}"
            )
        told[key] = (file.answers(annotation, number), kind(annotation, whole))
    if missing := about.keys() - told.keys():
        raise file.fault(
            f"answers {len(told)} of {len(about)} questions of {asked.path.name}, "
            f"question_id {min(missing)} is missing: {SAME}"
        )
    return told

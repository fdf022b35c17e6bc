"""Tiny copies of the VQA benchmarks' data, in the official formats; the same names and fields.

WRITERS[name](folder) writes all splits of a benchmark, four questions each but where said.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

QUESTIONS = ("What color is the dog?", "How many dogs?", "Is it a dog?", "What is on the t-shirt?")
ANSWERS = ("blue", "2", "yes", "t-shirt, red")
KINDS = ("other", "number", "yes/no", "other")


def save(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")


def picture(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (40 * number % 256, 80, 120)).save(path)


def ten(answer: str, number: int) -> list[str]:
    """Ten people's answers, of which 7 agree."""
    return [answer] * 7 + [f"other {number}"] * 3


def _coco(folder: Path, split: str, prefix: str, first: int, whole: dict, details: Callable[[int], dict]):
    """Two questions about each of two pictures; annotations where details are given."""
    pictures = "test2015" if split.startswith("test") else split
    questions, annotations = [], []
    for number, text in enumerate(QUESTIONS):
        image = first + number // 2
        picture(folder / pictures / f"COCO_{pictures}_{image:012d}.jpg", image)
        ids = {"image_id": image, "question_id": 1000 * image + number % 2}
        questions.append({**ids, "question": text})
        annotations.append({**ids, **details(number)})
    about = {"info": {"version": "2.0"}, "license": {"name": "CC BY 4.0"}, "data_subtype": split}
    asked = {**about, "task_type": "Open-Ended", "data_type": "mscoco", "questions": questions}
    save(folder / f"{prefix}OpenEnded_mscoco_{split}_questions.json", asked)
    if not split.startswith("test"):
        told = {**about, **whole, "data_type": "mscoco", "annotations": annotations}
        save(folder / f"{prefix}mscoco_{split}_annotations.json", told)


def vqav2(folder: Path) -> None:
    def details(number: int) -> dict:
        texts = ten(ANSWERS[number], number)
        answers = [
            {"answer": text, "answer_confidence": "yes", "answer_id": n} for n, text in enumerate(texts, 1)
        ]
        return {
            "question_type": "what",
            "multiple_choice_answer": texts[0],
            "answers": answers,
            "answer_type": KINDS[number],
        }

    for split, first in {"train2014": 9, "val2014": 42, "test-dev2015": 1, "test2015": 1}.items():
        _coco(folder, split, "v2_", first, {}, details)


def okvqa(folder: Path) -> None:
    def details(number: int) -> dict:
        answers = [
            {"answer_id": n, "raw_answer": f"{text}s", "answer_confidence": "yes", "answer": text}
            for n, text in enumerate(ten(ANSWERS[number], number), 1)
        ]
        kind = ("eight", "nine", "other", "eight")[number]
        return {"answer_type": "other", "question_type": kind, "answers": answers, "confidence": 3}

    types = {"eight": "Plants and Animals", "nine": "Science and Technology", "other": "Other"}
    for split, first in {"train2014": 9, "val2014": 42}.items():
        _coco(folder, split, "", first, {"question_types": types}, details)


def textvqa(folder: Path) -> None:
    """Of recognised words, only those of the validation split."""
    for split, first in {"train": 0, "val": 34602, "test": 39602}.items():
        pictures = "test_images" if split == "test" else "train_images"
        entries = []
        for number, text in enumerate(QUESTIONS):
            image = f"{first + number // 2:016x}"
            picture(folder / pictures / f"{image}.jpg", first + number)
            entry = {
                "question": text,
                "image_id": image,
                "image_classes": ["Dog"],
                "flickr_original_url": "https://example.org/1.jpg",
                "image_width": 8,
                "image_height": 6,
                "question_tokens": text.lower().rstrip("?").split(),
                "question_id": first + number,
                "set_name": split,
            }
            entries.append(entry if split == "test" else {**entry, "answers": ten(ANSWERS[number], number)})
        about = {"dataset_type": split, "dataset_name": "textvqa", "dataset_version": "0.5.1"}
        save(folder / f"TextVQA_0.5.1_{split}.json", {**about, "data": entries})
    words = [{"image_id": f"{34602:016x}", "ocr_tokens": ["DOG", "7"], "ocr_info": []}]
    save(folder / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": words})


def vizwiz(folder: Path) -> None:
    for split in ("train", "val", "test"):
        entries = []
        for number, text in enumerate(QUESTIONS):
            image = f"VizWiz_{split}_{number:08d}.jpg"
            picture(folder / split / image, number)
            entry: dict[str, Any] = {"image": image, "question": text}
            if split != "test":
                answer = "unanswerable" if number == 3 else ANSWERS[number]
                texts = ten(answer, number)
                entry["answers"] = [{"answer_confidence": "yes", "answer": each} for each in texts]
                entry["answer_type"] = "unanswerable" if number == 3 else KINDS[number]
                entry["answerable"] = int(number != 3)
            entries.append(entry)
        save(folder / f"{split}.json", entries)


GQA_STRUCTURES = ("query", "choose", "verify", "query")
GQA_ANSWERS = ("blue", "left", "yes", "t-shirt")


def gqa(folder: Path) -> None:
    splits = ("train_balanced", "val_balanced", "testdev_balanced", "testdev_all", "test_balanced")
    for first, name in enumerate((*splits, "challenge_balanced")):
        save(folder / f"{name}_questions.json", _gqa_questions(folder, 100 * first, name.split("_")[0]))


def _gqa_questions(folder: Path, first: int, split: str) -> dict[str, dict]:
    found = {}
    for number in range(4):
        image = f"n{first + number // 2}" if split == "testdev" else str(2370000 + first + number // 2)
        picture(folder / "images" / f"{image}.jpg", number)
        entry: dict[str, Any] = {"isBalanced": True, "question": QUESTIONS[number], "imageId": image}
        if split not in ("test", "challenge"):
            entry |= {
                "semantic": [{"operation": "select", "dependencies": [], "argument": "dog (1231798)"}],
                "entailed": [],
                "equivalent": [f"{first + number:08d}"],
                "groups": {"global": None, "local": "14-dog"},
                "answer": GQA_ANSWERS[number],
                "annotations": {"answer": {}, "question": {"3": "1231798"}, "fullAnswer": {}},
                "types": {"detailed": "d", "semantic": "attr", "structural": GQA_STRUCTURES[number]},
                "fullAnswer": f"It is {GQA_ANSWERS[number]}.",
            }
        found[f"{first + number:08d}"] = entry
    return found


WRITERS: dict[str, Callable[[Path], None]] = {
    "vqav2": vqav2,
    "okvqa": okvqa,
    "textvqa": textvqa,
    "vizwiz": vizwiz,
    "gqa": gqa,
}

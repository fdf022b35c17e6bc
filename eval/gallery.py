"""Queries with what the model said, the shots that it saw, and where each word of its answer looked.

T tokens, N images, G places of the encoder's grid.
"""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from flamingo.eval.config import EvalConfig
from flamingo.eval.few_shot import Prompt, Setting, build
from flamingo.eval.predictor import Predictor
from flamingo.eval.run import check_complete
from flamingo.eval.task import Task
from flamingo.looking import token_maps, word_maps

COUNT, WITH_SHOTS = 24, 8  # entries of a setting without shots, and of one with shots
SIDE, SHOT_SIDE = 256, 128  # pixels of the longer side of an embedded picture, and of a shot's, at most
RIGHT = 0.5  # a score from here on counts as right: of VQA, two of ten people
Record = dict[str, Any]


def gallery(model: Path, task: Task, config: EvalConfig, answers: Path) -> list[dict[str, Any]]:
    """Entries of the fewest shots and of the fewest above none.

    {"setting", "image_png", "question", "answer", "prediction", "correct": bool | None without a score of
    its own, "score", "kind", "words": [{"word", "map": rows x columns that sum to 1}],
    "shots": [{"image_png": None where only its text was shown, "answer"}]}
    """
    plain = [setting for setting in config.settings() if not setting.control]
    shown = {setting.shots: setting for setting in reversed(plain)}  # of several seeds the first
    chosen = [shown[min(shown)]]
    chosen += [shown[shots] for shots in sorted(shown) if shots and shown[shots] not in chosen][:1]
    predictor = Predictor(model)
    queries = {query.id: query for query in task.queries}
    pool = {example.id: example for example in task.pool}
    entries = []
    for setting in chosen:
        count = WITH_SHOTS if setting.shots else COUNT
        for record in choose(check_complete(task.benchmark, answers, setting, task.queries), count):
            shots = [pool[shot["id"]] for shot in record["shots"]]
            prompt = build(task.benchmark, queries[record["id"]], shots, setting)
            entries.append(_entry(predictor, task, setting, record, prompt))
    return entries


def choose(records: Sequence[Record], count: int, seed: int = 0) -> list[Record]:
    """A few answers of every kind, up to a third of them wrong, more where few are right; any, where
    answers have no score."""
    shuffled = random.Random(seed).sample(records, len(records))
    wrong = [r for r in shuffled if correct(r) is False][: count // 3]
    kinds = sorted({record["kind"] for record in records})
    right = [next((r for r in shuffled if correct(r) and r["kind"] == kind), None) for kind in kinds]
    chosen = [*[r for r in right if r][: count - len(wrong)], *wrong]
    taken = {record["id"] for record in chosen}
    more = sorted((r for r in shuffled if r["id"] not in taken), key=lambda r: correct(r) is False)
    return [*chosen, *more][:count]


def correct(record: Mapping[str, Any]) -> bool | None:
    """None where the answer has no score by itself."""
    return None if record["score"] is None else bool(record["score"] >= RIGHT)


def _entry(
    predictor: Predictor, task: Task, setting: Setting, record: Record, prompt: Prompt
) -> dict[str, Any]:
    query = prompt.example
    if task.classes:
        maps = token_maps(predictor.model, *_asked(predictor, prompt, []))
        words = [{"word": record["prediction"], "map": _last(maps[-1]).tolist()}]
    else:
        words = looks(predictor, prompt, record["raw"])
        words = words[: max(1, len(record["prediction"].split()))]  # without what was tidied away
    return {
        "setting": setting.name,
        "image_png": embedded(query.image),
        "question": query.question or query.context,
        "answer": query.answers[0] if query.answers else "",
        "prediction": record["prediction"],
        "correct": correct(record),
        "score": record["score"],
        "kind": record["kind"],
        "words": words,
        "shots": [
            {
                "image_png": embedded(Path(shot["image"]), SHOT_SIDE) if prompt.prefix_images else None,
                "answer": shot["answer"],
            }
            for shot in record["shots"]
        ],
    }


def embedded(image: Path, side: int = SIDE) -> str:
    """The picture as base64 PNG, at most so many pixels wide and high."""
    with PIL.Image.open(image) as opened:
        picture = opened.convert("RGB")
    picture.thumbnail((side, side), PIL.Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def looks(predictor: Predictor, prompt: Prompt, said: str) -> list[dict[str, Any]]:
    """Per word of what the model said, as it was generated, its map over the query's picture:
    {"word": str, "map": rows x columns floats that sum to 1}."""
    tokenizer = predictor.processor.tokenizer  # type: ignore[attr-defined]
    ids = tokenizer(said, add_special_tokens=False)["input_ids"] if said.strip() else []
    words = word_maps(predictor.model, tokenizer, *_asked(predictor, prompt, ids))
    return [{"word": word.word, "map": _last(word.maps).tolist()} for word in words]


def _asked(predictor: Predictor, prompt: Prompt, answer: Sequence[int]) -> tuple[Any, Any, Tensor]:
    """The prompt's token ids, the answer's, and float[N, 3, S, S] of all its pictures."""
    tokenizer = predictor.processor.tokenizer  # type: ignore[attr-defined]
    asked = tokenizer(prompt.prefix + prompt.text, add_special_tokens=False)["input_ids"]
    images = (*prompt.prefix_images, *prompt.images)
    pixels = torch.stack([predictor.pixels(image) for image in images])
    return asked, answer, pixels.to(predictor.model.device)


def _last(maps: Tensor) -> Tensor:
    """float32[h, w] that sum to 1, of float32[N, h, w]: over the query's picture alone."""
    return maps[-1] / maps[-1].sum().clamp(min=1e-12)

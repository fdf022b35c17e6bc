"""Seconds per answer of several models at several numbers of shots, in one process, in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flamingo.eval.benchmarks import easy_vqa
from flamingo.eval.few_shot import Prompt, Setting, build, choose_shots, limited
from flamingo.eval.predictor import Predictor
from flamingo.folders import load_model
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.processing import FlamingoProcessor
from flamingo.runtime import short_attention, tune_cpu

POOL = 32  # demonstrations that shots are drawn from
NEW_TOKENS = easy_vqa.MAX_NEW_TOKENS


def prompts(shots: int, answers: int, seed: int = 0) -> list[Prompt]:
    """Questions about different pictures, each with shots of its own."""
    setting = Setting(shots, seed=seed)
    queries = limited(easy_vqa.examples(None, easy_vqa.QUERIES), answers, seed)
    pool = limited(easy_vqa.examples(None, easy_vqa.DEMONSTRATIONS), max(POOL, shots + 8), seed)
    return [build(easy_vqa, query, choose_shots(pool, query, setting), setting) for query in queries]


def load(folder: Path) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    return load_model(folder), FlamingoProcessor.from_pretrained(folder)  # type: ignore[return-value]


def seconds_per_answer(model: Any, processor: Any, asked: Sequence[Prompt]) -> float:
    """Pictures to answers, with nothing encoded before."""
    predictor = Predictor.of(model, processor, max_new_tokens=NEW_TOKENS)
    began = time.perf_counter()
    with short_attention():
        answered = list(predictor.predict(asked))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    assert len(answered) == len(asked)
    return (time.perf_counter() - began) / len(asked)


def read_tokens(model: Any, processor: Any, asked: Sequence[Prompt]) -> float:
    """Tokens of a prompt as the language model reads it, the mean."""
    text = processor.tokenizer([p.prefix + p.text for p in asked], add_special_tokens=False)["input_ids"]
    images = sum(len(p.prefix_images) + len(p.images) for p in asked)
    return (sum(map(len, text)) + (model.image_tokens - 1) * images) / len(asked)


def measure(
    folders: dict[str, Path], shots: Sequence[int], answers: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """Name -> {image_tokens, image_values, shots: {number: {seconds, ratio, ratio_range, tokens}}}.

    seconds: of an answer, the median of the rounds; ratio: to the first model, the median of what each
    round gives, in which the models take their turns; tokens: of a prompt, as the LM reads it.
    """
    tune_cpu()
    models = {name: load(folder) for name, folder in folders.items()}
    found: dict[str, dict[str, Any]] = {
        name: {"image_tokens": model.image_tokens, "image_values": model.image_values, "shots": {}}
        for name, (model, _) in models.items()
    }
    for number in shots:
        asked = prompts(number, answers)
        for model, processor in models.values():
            seconds_per_answer(model, processor, asked[:1])  # fresh memory is slow
        took: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(rounds):
            for name, (model, processor) in models.items():
                took[name].append(seconds_per_answer(model, processor, asked))
        first = next(iter(took.values()))
        for name, (model, processor) in models.items():
            ratios = sorted(own / other for own, other in zip(took[name], first, strict=True))
            found[name]["shots"][str(number)] = {
                "seconds": float(f"{statistics.median(took[name]):.4g}"),
                "ratio": round(statistics.median(ratios), 3),
                "ratio_range": [round(ratios[0], 3), round(ratios[-1], 3)],
                "tokens": round(read_tokens(model, processor, asked), 1),
            }
    return found

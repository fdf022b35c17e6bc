"""Test pictures with what the model said and where each generated word looked."""

from __future__ import annotations

import base64
import random
from pathlib import Path

import torch
from einops import rearrange

from flamingo.eval.predictor import Predictor
from flamingo.processing import IMAGE


def choose(records: list[dict], count: int, seed: int = 0) -> list[dict]:
    """A few answers of every kind, up to a third of them wrong."""
    shuffled = random.Random(seed).sample(records, len(records))
    kinds = sorted({record["kind"] for record in records})
    wrong = [r for r in shuffled if not r["score"]][: count // 3]
    right = [next((r for r in shuffled if r["score"] and r["kind"] == kind), None) for kind in kinds]
    more = [r for r in shuffled if r["score"] and r not in right]
    return [*[r for r in right if r], *wrong, *more][:count]


@torch.inference_mode()
def looks(predictor: Predictor, text: str, image: Path) -> list[dict]:
    """Generate after `text` (one <image>) and return, per generated word, its map over the grid.

    A word of several tokens has the mean of their maps: {"word": str, "map": rows x columns
    floats that sum to 1}. A token's map is that of the position that chose it.
    """
    model, tokenizer = predictor.model, predictor.processor.tokenizer  # type: ignore[attr-defined]
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].to(model.device)
    pixels = predictor.pixels(image)[None].to(model.device)
    out = model.generate(
        input_ids=ids, pixel_values=pixels, max_new_tokens=predictor.max_new_tokens, do_sample=False
    )
    maps = model.attention_maps(out, pixels)[0]  # [T, G]
    rows, _ = model.config.vision_config.grid  # type: ignore[union-attr]
    words: list[dict] = []
    stops = {model.config.end_of_chunk_token_id, tokenizer.eos_token_id}
    for place in range(ids.shape[1], out.shape[1]):  # type: ignore[union-attr]
        token = int(out[0, place])  # type: ignore[index]
        if token in stops:
            break
        piece = tokenizer.decode([token])
        grid = rearrange(maps[place - 1], "(h w) -> h w", h=rows).float().cpu()
        if piece.startswith((" ", "\n")) or not words:
            words.append({"word": piece.strip(), "maps": [grid]})
        else:
            words[-1]["word"] += piece
            words[-1]["maps"].append(grid)
    return [{"word": w["word"], "map": torch.stack(w["maps"]).mean(0).tolist()} for w in words]


def gallery(predictor: Predictor, benchmark, records: list[dict], count: int = 24) -> list[dict]:
    """Entries for the report, from 0-shot answers."""
    by_id = {query.id: query for query in benchmark.queries()}
    entries = []
    for record in choose(records, count):
        query = by_id[record["id"]]
        entries.append(
            {
                "image_png": base64.b64encode(query.image.read_bytes()).decode(),
                "question": query.question,
                "answer": query.answers[0],
                "prediction": record["prediction"],
                "correct": bool(record["score"]),
                "kind": record["kind"],
                "words": looks(predictor, f"{IMAGE}{benchmark.prompt(query)}", query.image),
            }
        )
    return entries

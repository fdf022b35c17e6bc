"""Many prompts, answered in batches of about one length; each picture is encoded once.

B rows, T prompt tokens, A tokens of an answer, N pictures of all rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from flamingo.runtime import short_attention
from flamingo.serving.engine import Engine
from flamingo.serving.pictures import Pictures
from flamingo.serving.prompt import Sampling
from flamingo.serving.requests import Request
from flamingo.serving.styles import Style

WINDOW = 64  # batches whose prompts are sorted by length at a time


@dataclass(frozen=True)
class _Row:
    request: Request
    ids: list[int]
    length: int  # tokens that the LM reads


class Batcher:
    """Asks a model the prompts of a file, `size` at a time. Raises ValueError for a size below 1."""

    def __init__(self, engine: Engine, size: int = 8, style: Style = "few-shot") -> None:
        if size < 1:
            raise ValueError(f"batch_size={size}: must be at least 1")
        self.engine, self.size = engine, size
        self.style: Style = style
        self.pictures = Pictures(engine.model, engine.processor.image_processor.transform)

    def answers(self, requests: Sequence[Request]) -> Iterator[list[dict[str, Any]]]:
        """Records of a batch at a time, in any order: {id, answer, prompt_tokens, new_tokens,
        finish}, or {id, error} for a prompt that cannot be asked.

        Raises ValueError where a batch is more than a GPU's memory holds.
        """
        for start in range(0, len(requests), WINDOW * self.size):
            rows, failed = [], []
            for request in requests[start : start + WINDOW * self.size]:
                try:
                    rows.append(self._row(request))
                except ValueError as error:
                    failed.append({"id": request.id, "error": str(error)})
            if failed:
                yield failed
            for batch in self._batches(rows):
                yield self._answered(batch)

    def _row(self, request: Request) -> _Row:
        text = request.prompt(self.style, self.engine.processor)
        (ids,) = self.engine.processor.token_ids([text])
        length = len(ids) + (self.engine.model.image_tokens - 1) * len(request.pictures)
        self.engine.check_room(length, request.sampling.max_new_tokens)
        return _Row(request, ids, length)

    def _batches(self, rows: list[_Row]) -> Iterator[list[_Row]]:
        """Of one sampling each. A prompt with a seed is drawn alone: its answer is its own."""
        groups: dict[Sampling, list[_Row]] = {}
        for row in rows:
            groups.setdefault(row.request.sampling, []).append(row)
        for sampling, group in groups.items():
            seeded = sampling.temperature > 0 and sampling.seed is not None
            size = 1 if seeded else max(1, self.size // sampling.num_beams)
            group.sort(key=lambda row: -row.length)  # what is too much for memory shows at once
            for start in range(0, len(group), size):
                yield group[start : start + size]

    def _answered(self, batch: list[_Row]) -> list[dict[str, Any]]:
        latents = self.pictures.load([path for row in batch for path in row.request.pictures])
        failed, good = [], []
        for row in batch:
            faults = [self.pictures.faults[p] for p in row.request.pictures if p not in latents]
            if faults:
                failed.append({"id": row.request.id, "error": faults[0]})
            else:
                good.append(row)
        if not good:
            return failed
        try:
            return failed + self._generated(good, latents)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"a batch of {len(good)} prompts of up to {good[0].length} tokens is more than the GPU's "
                f"memory holds: lower --batch-size ({error})"
            ) from None

    @torch.no_grad()
    def _generated(self, rows: list[_Row], latents: dict[Path, Tensor]) -> list[dict[str, Any]]:
        model, sampling = self.engine.model, rows[0].request.sampling
        if sampling.temperature > 0 and sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        ids = _padded([torch.tensor(row.ids) for row in rows]).to(model.device)
        mask = _padded([torch.ones(len(row.ids), dtype=torch.int64) for row in rows]).to(model.device)
        shown = [latents[path] for row in rows for path in row.request.pictures]
        media = model.media(latents=torch.stack(shown)) if shown else None
        with short_attention():
            out = model.generate(input_ids=ids, attention_mask=mask, media=media, **sampling.arguments())
        stops = set(model._stop_tokens(None))
        return [
            self._record(row, new, stops)
            for row, new in zip(rows, out[:, ids.shape[1] :].tolist(), strict=True)
        ]

    def _record(self, row: _Row, new: list[int], stops: set[int]) -> dict[str, Any]:
        """What comes after the first token that ends an answer is padding."""
        end = next((place + 1 for place, token in enumerate(new) if token in stops), None)
        text = self.engine.tokenizer.decode(new[:end], skip_special_tokens=True).strip()
        return {
            "id": row.request.id,
            "answer": text,
            "prompt_tokens": row.length,
            "new_tokens": len(new[:end]),
            "finish": "length" if end is None else "stop",
        }


def _padded(rows: list[Tensor]) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_side="left")

"""This repository's training step with each of its savings on or off, for `benchmarks.train`.

B rows, T tokens, H heads, D head width, N images, I images of the row with most, L latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from benchmarks.mixture import Step
from flamingo.attention import attend_plainly
from flamingo.cross_attention import GatedCrossAttentionBlock
from flamingo.data.batch import Batch, Collator
from flamingo.data.packing import Rows, packed, padded
from flamingo.factory import create
from flamingo.layers import split_heads
from flamingo.media import Runs
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.processing import FlamingoProcessor
from flamingo.runtime import short_attention
from flamingo.train.config import OptimizerConfig
from flamingo.train.features import FeatureCache
from flamingo.train.objective import Objective
from flamingo.train.optim import adamw
from flamingo.train.parts import compile_parts

SOURCES = ("captions", "documents")
MAX_TOKENS = {"captions": 32, "documents": 256}


@dataclass(frozen=True)
class Savings:
    """What a step saves. All off: a plain loop over padded rows, one pass per source."""

    own_rows: bool = False  # two rows of added tokens are trained, not the LM's whole table
    kept_memory: bool = False  # freed memory stays in the process, as with `flamingo train`
    frozen_bfloat16: bool = False
    plain_attention: bool = False  # on a CPU: products instead of torch's fused kernel
    kept_targets: bool = False  # logits of supervised tokens only
    immediate: bool = False  # a token attends to its image's latents, not to all under a mask
    packed: bool = False
    frozen_inputs: bool = False  # trains less: no graph below the first gated block
    cached: bool = False  # the grids of frozen pictures are kept
    compiled: bool = False  # the forwards of LM layers and resampler, as `compile: true` of a recipe

    @classmethod
    def first(cls, count: int) -> Savings:
        """The first so many, in the order above."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: number < count for number, name in enumerate(names)})


NAMES = [field.name for field in fields(Savings)]
STANDARD = NAMES.index("packed") + 1  # what a recipe with pack_tokens does


class MaskedBlock(GatedCrossAttentionBlock):
    """Attention over all images of a row under a mask, with images padded to the row with most:
    what a token does not see is computed and thrown away."""

    def forward(self, hidden: Tensor, keys: Tensor | None, values: Tensor | None, runs: Runs) -> Tensor:
        x = hidden.to(self.attn_gate.dtype)
        if keys is not None and values is not None and len(runs):
            x = x + self.scale * self.attn_gate.tanh() * self._looked(x, keys, values, runs)
        return (x + self.scale * self.ff_gate.tanh() * self.ff(x)).to(hidden.dtype)

    def _looked(self, x: Tensor, keys: Tensor, values: Tensor, runs: Runs) -> Tensor:
        """float[B, T, W]: what each token sees, zero where that is nothing."""
        latents = keys.shape[2]
        slots = runs.token.shape[1]
        seen = x.new_full(x.shape[:2], -1, dtype=torch.int64)
        seen.view(-1)[runs.source] = runs.image[runs.slot // slots]
        first = torch.where(seen < 0, len(keys), seen).amin(dim=1, keepdim=True)  # [B, 1]
        many = int((seen.amax(dim=1, keepdim=True) - first).amax()) + 1
        index = first + torch.arange(many, device=x.device)  # [B, I]
        k, v = (
            rearrange(y[index.clamp_max(len(keys) - 1)], "b i h l d -> b h (i l) d") for y in (keys, values)
        )
        mask = repeat(seen[..., None] == index[:, None], "b t i -> b 1 t (i l)", l=latents)
        q = self.attn.q_norm(split_heads(self.attn.to_q(self.attn.norm(x)), self.attn.heads))
        scores = q @ k.to(q.dtype).transpose(-1, -2) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~mask, -torch.finfo(scores.dtype).max).softmax(dim=-1)
        weights = weights.masked_fill(rearrange(seen < 0, "b t -> b 1 t 1"), 0.0)
        return self.attn.to_out(rearrange(weights.to(v.dtype) @ v, "b h t d -> b t (h d)"))


class AllLogits(Objective):
    """The objective of a plain loop: logits of every position, of which the supervised are kept."""

    def _nll(self, rows: Rows, blank: bool) -> tuple[Tensor, None]:
        grids = self.cache.grids(rows)
        with torch.autocast(self.model.device.type, self.autocast, enabled=self.autocast != torch.float32):
            out = self.model(
                input_ids=rows.input_ids,
                attention_mask=rows.attention_mask,
                segment_ids=rows.segment_ids,
                media=self.model.media(grids=grids) if rows.image_keys else None,
                use_cache=False,
            )
        labels = F.pad(rows.labels[:, 1:], (0, 1), value=-100)
        logits = rearrange(out.logits.float(), "b t v -> (b t) v")
        nll = F.cross_entropy(logits, rearrange(labels, "b t -> (b t)"), reduction="none")
        kept = rearrange(labels != -100, "b t -> (b t)")
        return nll[kept], None


def load(
    vision: str, language: str, savings: Savings, architecture: Mapping[str, Any]
) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """The model with the savings that lie in it."""
    dtype = torch.bfloat16 if savings.frozen_bfloat16 else torch.float32
    model, processor = create(vision=vision, language=language, frozen_dtype=dtype, **architecture)
    return equip(model, savings), processor


def equip(model: FlamingoForConditionalGeneration, savings: Savings) -> FlamingoForConditionalGeneration:
    """Switch on or off, in a model, what of the savings lies in it."""
    model.train()
    if not savings.own_rows:
        model.unfreeze("embeddings")
    if savings.plain_attention:
        attend_plainly(model.language_model)
    if not savings.immediate:
        for block in model.gated_blocks:
            block.__class__ = MaskedBlock  # the same weights, another way to attend
    if savings.frozen_inputs:
        model.added_tokens.input.requires_grad_(False)
    if savings.compiled:
        compile_parts(model)
    return model


class Ours:
    """One side of the benchmark."""

    def __init__(
        self,
        model: FlamingoForConditionalGeneration,
        processor: FlamingoProcessor,
        savings: Savings,
        autocast: torch.dtype,
        weights: Sequence[float],
        pack_tokens: int,
    ):
        self.model, self.savings, self.pack_tokens = model, savings, pack_tokens
        cache = FeatureCache(model, 4.0 if savings.cached else 0.0)
        self.cache = cache
        objective = Objective if savings.kept_targets else AllLogits
        self.objective = objective(model, dict(zip(SOURCES, weights, strict=True)), cache, autocast)
        self.optimizer = adamw(self.objective, OptimizerConfig(lr=1e-4))  # type: ignore[call-arg]
        self.trained = [p for p in self.objective.parameters() if p.requires_grad]
        config = model.config
        self.collators = {
            name: Collator(
                processor.tokenizer,
                processor.image_processor.transform,  # type: ignore[attr-defined]
                config.image_token_id,
                config.end_of_chunk_token_id,
                MAX_TOKENS[name],
            )
            for name in SOURCES
        }

    def prepare(self, step: Step) -> list[Batch]:
        """The step as the loader gives it: one batch per source."""
        samples = (step.captions, step.documents)
        return [
            self.collators[name]([sample.document(f"{name}/{i}") for i, sample in enumerate(part)])
            for name, part in zip(SOURCES, samples, strict=True)
        ]

    def train(self, batches: list[Batch]) -> dict[str, Any]:
        """count targets -> forward -> backward -> clip once -> step, as `flamingo.train.loop`."""
        targets = {name: batch.n_targets for name, batch in zip(SOURCES, batches, strict=True)}
        if self.savings.packed:
            passes = packed(batches, self.pack_tokens, self.model.config.image_token_id)
        else:
            passes = padded(batches)
        passes = [rows.to(self.model.device) for rows in passes]
        if self.savings.cached:
            passes = [self._without_known_pixels(rows) for rows in passes]
        with ExitStack() as stack:
            if self.savings.plain_attention:
                stack.enter_context(short_attention())
            loss, sums = self.objective(passes, targets)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        counts = torch.tensor(list(targets.values()))
        labels = [batch.labels[:, 1:] for batch in batches]
        return {
            "losses": (sums.cpu() / counts).tolist(),
            "tokens": sum(rows.input_ids.numel() for rows in passes),
            "images": sum(len(rows.image_keys) for rows in passes),
            "targets": torch.cat([x[x != -100] for x in labels]),
        }

    def _without_known_pixels(self, rows: Rows) -> Rows:
        """As a loader leaves out the pixels of pictures whose grids are held."""
        if not all(self.cache.has(key) for key in rows.image_keys):
            return rows
        return replace(
            rows, pixel_values=rows.pixel_values[:0], pixel_index=torch.full_like(rows.pixel_index, -1)
        )

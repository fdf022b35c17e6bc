"""Prompts -> generated answers, or likelihoods of classes, with nothing computed twice.

Each picture is encoded once; what many prompts begin with is read once; equal prompts are asked
once; rows of a batch have about the same length. N images, L latents, W resampler width, S pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flamingo.eval import decoding
from flamingo.eval.few_shot import Prompt
from flamingo.eval.images import Images, Picture, read_pixels
from flamingo.eval.likelihood import Tree, continuations, rank_rows, text_tail
from flamingo.eval.states import Row, Shared, State, columns_are_free, keeps_keys_and_values
from flamingo.folders import load_model
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.processing import IMAGE, FlamingoProcessor
from flamingo.runtime import at_rest

WINDOW = 4096  # prompts that are sorted at a time
PADDING = 1 / 8  # of a batch, at most
SHARED_COLUMNS = 16  # times tokens_per_batch: columns of a batch, with those of the shared prefix
TREE_SHARE = 1 / 4  # of tokens_per_batch: nodes of classes read at a time; each has its logits


class Predictor:
    """Asks a model many prompts. Pictures that were encoded are kept from call to call.

    Attributes:
        model, processor; max_new_tokens: of an answer; beams: 1 is greedy; length_penalty: of beam
        search, 0 as in OpenFlamingo's evaluation. images: what was encoded.
    """

    def __init__(
        self,
        folder: str | Path,
        max_new_tokens: int = 5,
        beams: int = 1,
        tokens_per_batch: int = 2048,
        length_penalty: float = 0.0,
        images_gib: float | None = None,
    ):
        """folder: a model folder; tokens_per_batch: that are computed at a time; images_gib: memory for
        encoded pictures (None: `images.default_gib`). Raises ValueError for numbers below 1."""
        model = load_model(Path(folder))
        processor = FlamingoProcessor.from_pretrained(folder)
        self._start(model, processor, max_new_tokens, beams, tokens_per_batch, length_penalty, images_gib)

    @classmethod
    def of(
        cls,
        model: FlamingoForConditionalGeneration,
        processor: FlamingoProcessor,
        max_new_tokens: int = 5,
        beams: int = 1,
        tokens_per_batch: int = 2048,
        length_penalty: float = 0.0,
        images_gib: float | None = None,
    ) -> Predictor:
        """For a model in memory, which stays as it is. What it encoded is kept: after its weights have
        changed, make a new one."""
        predictor = cls.__new__(cls)
        predictor._start(
            model, processor, max_new_tokens, beams, tokens_per_batch, length_penalty, images_gib
        )
        return predictor

    def _start(
        self, model, processor, max_new_tokens, beams, tokens_per_batch, length_penalty, images_gib
    ) -> None:
        given = {"max_new_tokens": max_new_tokens, "beams": beams, "tokens_per_batch": tokens_per_batch}
        least = {"max_new_tokens": 0}  # benchmarks that rank classes have none
        for name, value in given.items():
            if value < least.get(name, 1):
                raise ValueError(f"{name}={value}: must be at least {least.get(name, 1)}")
        self.model, self.processor = model, processor
        self.max_new_tokens, self.beams, self.tokens_per_batch = max_new_tokens, beams, tokens_per_batch
        self.length_penalty = length_penalty
        self.images = Images(model, processor.image_processor.transform, images_gib)
        self._trees: dict[tuple[str, tuple[str, ...]], Tree] = {}
        self._held: tuple[Any, Shared] | None = None

    # -- what is asked -------------------------------------------------------------------

    def predict(self, prompts: Iterable[Prompt]) -> Iterator[tuple[Prompt, str]]:
        """(prompt, text as generated), batch by batch as they are done, in any order.

        Raises ValueError for prompts whose pictures cannot be read or do not match their <image>
        tokens, or that are longer than the LM's positions.
        """
        if not self.max_new_tokens:
            raise ValueError("max_new_tokens=0: nothing would be written; ask for at least 1")
        decode = self.processor.tokenizer.batch_decode  # type: ignore[attr-defined]
        for window in self._windows(prompts):
            for rows, shared in self._batches(window, self.max_new_tokens, copies=self.beams):
                with self._at_rest():
                    state = State(self.model, self.images, rows, shared, self._plain_cache)
                    texts = decode(self._written(state), skip_special_tokens=True)
                for row, text in zip(rows, texts, strict=True):
                    yield from ((prompt, text) for prompt in row.owners)

    def rank(
        self, prompts: Iterable[Prompt], classes: Sequence[str]
    ) -> Iterator[tuple[Prompt, tuple[float, ...]]]:
        """(prompt, log-likelihood of each class as its continuation), in any order.

        Summed over the class's tokens; what would end the answer is not counted. Raises ValueError as
        `predict`, and for a class without tokens.
        """
        if not classes:
            raise ValueError("classes: there are none to rank")
        budget = max(1, int(self.tokens_per_batch * TREE_SHARE))
        for window in self._windows(prompts):
            by_tree: dict[Tree, list[Prompt]] = {}
            for prompt in window:
                by_tree.setdefault(self._tree(prompt.text, tuple(classes)), []).append(prompt)
            for tree, asked in by_tree.items():
                most = budget // min(budget, max(1, len(tree.contexts) - 1))
                for rows, shared in self._batches(asked, tree.longest, most=most):
                    free = len(tree.contexts) > 1 and self._free
                    with self._at_rest():
                        state = State(self.model, self.images, rows, shared, self._plain_cache)
                        found = rank_rows(state, tree, budget, free)
                    for row, scores in zip(rows, found, strict=True):
                        yield from ((prompt, scores) for prompt in row.owners)

    def pixels(self, image: Picture) -> Tensor:
        """float32[3, S, S]; zeros, the mean colour, for a blank picture."""
        return read_pixels(image, self.images.transform)

    def encode(self, images: Sequence[Picture]) -> Tensor:
        """float[N, L, W] latents of the pictures, in order; those known already are not encoded again."""
        with self._at_rest():
            return self.images.latents(images)

    # -- how it is put in batches --------------------------------------------------------

    def _windows(self, prompts: Iterable[Prompt]) -> Iterator[list[Prompt]]:
        """Prompts that follow each other, as many as have their pictures in memory together."""
        window: list[Prompt] = []
        pictures: set[Picture] = set()
        for prompt in prompts:
            new = {*prompt.prefix_images, *prompt.images} - pictures
            if window and (len(window) == WINDOW or len(pictures) + len(new) > self.images.room):
                yield window
                window, pictures = [], set()
                new = {*prompt.prefix_images, *prompt.images}
            window.append(prompt)
            pictures |= new
        if window:
            yield window

    def _batches(
        self, prompts: Sequence[Prompt], further: int, copies: int = 1, most: int | None = None
    ) -> Iterator[tuple[list[Row], Shared | None]]:
        """Rows that are computed together, and what stands before them all.

        further: tokens after a prompt, for which there must be positions; copies: of each row, in
        beam search; most: rows of a batch.
        """
        groups: dict[tuple, dict[tuple, list[Prompt]]] = {}
        for prompt in prompts:
            equal = groups.setdefault((prompt.prefix, prompt.prefix_images), {})
            equal.setdefault((prompt.text, prompt.images), []).append(prompt)
        ids = self._tokens({text for p in prompts for text in (p.prefix, p.text)})
        alone: list[Row] = []
        for (prefix, pictures), equal in groups.items():
            rows = [Row(ids[text], images, owners) for (text, images), owners in equal.items()]
            whole = [Row(ids[prefix] + r.ids, pictures + r.images, r.owners) for r in rows]
            for row in whole:
                self._check(row, further)
            if self._is_worth_sharing(prefix, pictures, rows):
                shared = self._shared(prefix, ids[prefix], pictures)
                yield from ((batch, shared) for batch in self._cut(rows, len(shared.ids), copies, most))
            else:
                alone += whole
        yield from ((batch, None) for batch in self._cut(alone, 0, copies, most))

    def _cut(self, rows: list[Row], before: int, copies: int, most: int | None) -> Iterator[list[Row]]:
        """Batches of about one length, the longest first: what is too much for memory shows at once."""
        rows = sorted(rows, key=lambda row: -len(row.ids))
        exact = not self._plain_cache
        if before and rows and len(rows[0].ids) != len(rows[-1].ids):
            exact = not self._free  # padding would stand between the prefix and the row
        batch: list[Row] = []
        for row in rows:
            longest = len(batch[0].ids) if batch else len(row.ids)
            count = (len(batch) + 1) * copies
            full = count * longest > self.tokens_per_batch
            full |= count * (before + longest) > SHARED_COLUMNS * self.tokens_per_batch
            full |= most is not None and len(batch) == most
            shorter = longest - len(row.ids)
            if batch and (full or shorter > (0 if exact else PADDING * longest)):
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _is_worth_sharing(self, prefix: str, pictures: tuple[Picture, ...], rows: list[Row]) -> bool:
        known = self._held is not None and self._held[0] == (prefix, pictures)
        return bool(prefix) and self._plain_cache and (len(rows) > 1 or known) and all(r.ids for r in rows)

    def _shared(self, prefix: str, ids: list[int], pictures: tuple[Picture, ...]) -> Shared:
        """A prefix, read; the last one is kept for the next call."""
        key = (prefix, pictures)
        if self._held is None or self._held[0] != key:
            self._held = None  # before the next one takes memory
            with self._at_rest():
                state = State(self.model, self.images, [Row(ids, pictures)])
                state.read()
                self._held = (key, state.after(0))
        return self._held[1]

    # -- what is known of prompts and of the LM ------------------------------------------

    def _tokens(self, texts: Iterable[str]) -> dict[str, list[int]]:
        texts = list(texts)
        image, each = self.model.config.image_token_id, self.model.image_tokens
        rows = self.processor.token_ids(texts)
        long = [[i for i in ids for _ in range(each if i == image else 1)] for ids in rows]
        return dict(zip(texts, long, strict=True))

    def _check(self, row: Row, further: int) -> None:
        name = row.owners[0].example.id
        marks = row.ids.count(self.model.config.image_token_id) // self.model.image_tokens
        if marks != len(row.images):
            raise ValueError(
                f"the prompt of {name!r} has {marks} {IMAGE} and {len(row.images)} pictures: "
                "every picture needs its own, and a question must not hold one"
            )
        if not row.ids:
            raise ValueError(f"the prompt of {name!r} is empty")
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and len(row.ids) + further > positions:
            raise ValueError(
                f"the prompt of {name!r} has {len(row.ids)} tokens and up to {further} follow, the LM has "
                f"{positions} positions (max_position_embeddings): ask for fewer shots or new tokens"
            )

    def _tree(self, text: str, classes: tuple[str, ...]) -> Tree:
        key = (text_tail(text), classes)
        if key not in self._trees:
            self._trees[key] = Tree.of(continuations(self.processor.tokenizer, key[0], classes))  # type: ignore
        return self._trees[key]

    @cached_property
    def _plain_cache(self) -> bool:
        return keeps_keys_and_values(self.model)

    @cached_property
    def _free(self) -> bool:
        with self._at_rest():
            return columns_are_free(self.model)

    # -- how it is computed --------------------------------------------------------------

    def _written(self, state: State) -> list[list[int]]:
        """Tokens of each row's answer."""
        stops, never = self.model._stop_tokens(None), self.model.config.image_token_id
        if self.beams == 1:
            return decoding.greedy(state, self.max_new_tokens, stops, never)
        return decoding.beams(state, self.max_new_tokens, stops, never, self.beams, self.length_penalty)

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        """Without gradients, and in eval mode."""
        with torch.inference_mode(), at_rest(self.model):
            yield

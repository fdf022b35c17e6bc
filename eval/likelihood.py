"""How likely each class is after a prompt: the prompt is read once, whatever the number of classes.

The classes' tokens are a tree. Its root is the prompt, whose last logits give all first tokens;
only nodes with children have to be read by the LM, all of them in one pass where it takes that.
B rows, C classes, M nodes of the tree that are read, E edges, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from flamingo.eval.states import Row, State

LOGSUMEXP_ROWS = 256  # of logits that are held in float32 at a time


def text_tail(text: str) -> str:
    """The last word of a text with the space after it: what decides how a continuation is split."""
    found = re.search(r"\S*\s*$", text)
    return found.group() if found else ""


def continuations(tokenizer: Any, text: str, classes: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Tokens of each class where it continues a text, as tokens of both together would be.

    Where a token would reach over the border, the class is taken by itself. Raises ValueError for a
    class without tokens.
    """
    tail = text_tail(text)
    border = tokenizer(tail, add_special_tokens=False)["input_ids"] if tail else []
    together = tokenizer([tail + each for each in classes], add_special_tokens=False)["input_ids"]
    ids = []
    for name, whole in zip(classes, together, strict=True):
        own = whole[len(border) :]
        if whole[: len(border)] != border or not own:
            own = tokenizer(name, add_special_tokens=False)["input_ids"]
        if not own:
            raise ValueError(f"class {name!r} has no tokens: every class needs a text to be ranked")
        ids.append(tuple(own))
    return tuple(ids)


@dataclass(frozen=True, eq=False)
class Tree:
    """Classes as paths of tokens from a common root.

    Attributes:
        contexts: the ways from the root to the nodes that have children, parents before children;
            the first is (), the root.
        edges: (context, token) of each edge; paths: per class the numbers of its edges.
    """

    contexts: tuple[tuple[int, ...], ...]
    edges: tuple[tuple[int, int], ...]
    paths: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, classes: Sequence[Sequence[int]]) -> Tree:
        contexts: dict[tuple[int, ...], int] = {(): 0}
        # In order, so that neighbours have much of their way in common.
        for ids in sorted(map(tuple, classes)):
            for end in range(1, len(ids)):
                contexts.setdefault(ids[:end], len(contexts))
        edges: dict[tuple[int, int], int] = {}
        paths = [
            tuple(
                edges.setdefault((contexts[tuple(ids[:i])], token), len(edges)) for i, token in enumerate(ids)
            )
            for ids in classes
        ]
        return cls(tuple(contexts), tuple(edges), tuple(paths))

    def parts(self, most: int) -> Iterator[list[int]]:
        """Contexts but the root, at most so many at a time, each after all those on its way: those
        that stood in an earlier part come again."""
        part: dict[int, None] = {}
        for context in self.contexts[1:]:
            way = [self.number[context[:end]] for end in range(1, len(context) + 1)]
            if part and len(part | dict.fromkeys(way)) > most:
                yield list(part)
                part = {}
            part |= dict.fromkeys(way)
        if part:
            yield list(part)

    def above(self, part: list[int]) -> Tensor:
        """bool[M, M] of a part: which contexts lie on the way to each, itself included."""
        place = {self.contexts[number]: i for i, number in enumerate(part)}
        above = torch.zeros(len(part), len(part), dtype=torch.bool)
        for context, i in place.items():
            above[i, [place[context[:end]] for end in range(1, len(context) + 1)]] = True
        return above

    @cached_property
    def number(self) -> dict[tuple[int, ...], int]:
        """Of each context."""
        return {context: i for i, context in enumerate(self.contexts)}

    @cached_property
    def longest(self) -> int:
        """Tokens of a class."""
        return max(map(len, self.paths))

    @cached_property
    def deepest(self) -> list[int]:
        """Contexts that no other one goes on from, but the root."""
        inner = {context[:-1] for context in self.contexts}
        return [i for i, context in enumerate(self.contexts) if context and context not in inner]


class Likelihoods:
    """Log-likelihoods of a tree's edges for the rows of one batch, gathered pass by pass."""

    def __init__(self, tree: Tree, rows: int, device: torch.device):
        self.tree = tree
        self.edges = torch.zeros(rows, len(tree.edges), device=device)
        self.of_context: dict[int, list[int]] = {}
        for number, (context, _) in enumerate(tree.edges):
            self.of_context.setdefault(context, []).append(number)

    def take(self, logits: Tensor, contexts: Sequence[int], rows: slice = slice(None)) -> None:
        """float[B, M, V]: the logits after the contexts int[M], of all rows or some."""
        places, numbers, tokens = [], [], []
        for place, context in enumerate(contexts):
            for number in self.of_context.pop(context, []):
                places.append(place)
                numbers.append(number)
                tokens.append(self.tree.edges[number][1])
        if not numbers:
            return
        flat = logits.flatten(0, 1).split(LOGSUMEXP_ROWS)
        total = torch.cat([part.float().logsumexp(dim=-1) for part in flat]).view(logits.shape[:2])
        scores = logits[:, places, tokens].float() - total[:, places]
        self.edges[rows, torch.tensor(numbers, device=scores.device)] = scores

    def of_classes(self) -> list[tuple[float, ...]]:
        """Per row, of each class the sum over its tokens."""
        paths = self.tree.paths
        edges = torch.tensor([edge for path in paths for edge in path], device=self.edges.device)
        owner = torch.tensor([i for i, path in enumerate(paths) for _ in path], device=self.edges.device)
        sums = self.edges.new_zeros(len(self.edges), len(paths), dtype=torch.float64)
        sums.index_add_(1, owner, self.edges[:, edges].double())
        return [tuple(row) for row in sums.tolist()]


def rank_rows(state: State, tree: Tree, most: int, free: bool) -> list[tuple[float, ...]]:
    """Of each row the log-likelihood of each class.

    most: tokens that are read at a time; free: the LM reads branches in one pass
    (`columns_are_free`).
    """
    further = len(tree.contexts) > 1
    found = Likelihoods(tree, len(state), state.whole.device)
    found.take(state.read(keep=further and state.plain_cache), [0])
    if further and free:
        for part in tree.parts(max(1, most // len(state))):
            tokens = torch.tensor([tree.contexts[i][-1] for i in part], device=state.whole.device)
            found.take(state.branch(tokens, tree.above(part).to(tokens.device)), part)
    elif further:
        wanted = dict(found.of_context)
        for row in range(len(state)):
            found.of_context = dict(wanted)
            _way_by_way(state, row, found, most)
    return found.of_classes()


def _way_by_way(state: State, row: int, found: Likelihoods, most: int) -> None:
    """The ways of the tree as rows of their own: after the prompt, or with it where the LM's state
    cannot be shared."""
    tree, prompt = found.tree, state.row(row)
    before = state.after(row) if state.plain_cache else None
    by_length: dict[int, list[int]] = {}
    for number in tree.deepest:
        by_length.setdefault(len(tree.contexts[number]), []).append(number)
    for length, numbers in by_length.items():
        many = max(1, most // (length if before else len(prompt.ids) + length))
        for start in range(0, len(numbers), many):
            ways = [list(tree.contexts[number]) for number in numbers[start : start + many]]
            rows = [Row(way, ()) if before else Row(prompt.ids + way, prompt.images) for way in ways]
            logits = State(state.model, state.images, rows, before, state.plain_cache).read(
                length, keep=False
            )
            stops = [tree.number[tuple(way[:end])] for way in ways for end in range(1, length + 1)]
            found.take(rearrange(logits, "c t v -> 1 (c t) v"), stops, slice(row, row + 1))

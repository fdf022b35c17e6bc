"""What the LM writes after a batch of prompts: greedily, or by beams."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import GenerationMixin

from flamingo.eval.states import State


def greedy(state: State, most: int, stops: Sequence[int], never: int) -> list[list[int]]:
    """Tokens that each row writes before one of `stops`, at most so many; never this token.

    A row that has ended is not computed further, and nothing is after the last token.
    """
    written: list[list[int]] = [[] for _ in range(len(state))]
    rows = list(range(len(state)))
    logits = state.read(keep=most > 1)[:, 0]
    for count in range(1, most + 1):
        logits[:, never] = -torch.inf
        tokens = logits.float().argmax(dim=-1)
        going = []
        for place, token in enumerate(tokens.tolist()):
            if token not in stops:
                written[rows[place]].append(token)
                going.append(place)
        if count == most or not going:
            break
        if len(going) < len(rows):
            state.select(going)
            tokens, rows = tokens[going], [rows[place] for place in going]
        logits = state.step(tokens)
    return written


def beams(
    state: State, most: int, stops: Sequence[int], never: int, count: int, length_penalty: float
) -> list[list[int]]:
    """The same by transformers' beam search; the prompts are read once, not once per beam.

    length_penalty: as in transformers; 0 (OpenFlamingo's) leaves long answers as unlikely as they are.
    """
    model, length = state.model, state.whole.shape[1]
    if state.plain_cache and length - 1 > state.columns:
        state.read(until=length - 1)
    cache = state.cache if state.plain_cache and state.columns else None
    if cache is not None:
        cache.batch_repeat_interleave(count)
    given = {} if state.since is None else {"since": state.since}
    out = GenerationMixin.generate(  # pyright: ignore[reportAttributeAccessIssue]
        model,
        state.whole,
        attention_mask=state.mask,
        media=state.media,
        seen=state.seen,
        cache=cache,
        max_new_tokens=most,
        do_sample=False,
        num_beams=count,
        length_penalty=length_penalty,
        eos_token_id=list(stops),
        suppress_tokens=[never],
        **given,
    )
    return [_until(row, stops) for row in out[:, length:].tolist()]


def _until(tokens: list[int], stops: Sequence[int]) -> list[int]:
    ends = [place for place, token in enumerate(tokens) if token in stops]
    return tokens[: ends[0]] if ends else tokens

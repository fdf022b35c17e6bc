"""Attention in blocks as one operator of a compiled graph, which does not look into it.

Inductor would fuse the gathering of blocks with the rotary embedding around it, and then gather single
numbers: its two kernels took as long as a quarter of a layer's products.
B rows, T tokens, K heads of keys and values, H = K * G heads of queries, D head width; M blocks of S
places (`flamingo.attention_blocks`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from flamingo.attention_blocks import Blocks
from flamingo.attention_products import LEARNED, attended, gradients_of, in_parts

WHOLE = 1 << 30  # queries of a part where not all keys that a query sees are before it


def attend_in_blocks(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks) -> Tensor:
    """float[B, H, T, D] scaled, float[B, K, T, D] twice -> float[B, T, H, D]."""
    held = (blocks.mask, blocks.tokens, blocks.places, blocks.used)
    many = LEARNED if blocks.causal else WHOLE
    return _forward(query, key, value, *held, many)[0]


def _taken(x: Tensor, heads: int, tokens: Tensor, used: Tensor | None = None) -> Tensor:
    """float[B, T, K * G, D] -> float[M, K, G, S, D], 0 at places that are not used, where these are told."""
    flat = rearrange(x, "b t h d -> (b t) (h d)").index_select(0, tokens.flatten())
    if used is not None:
        flat.index_fill_(0, (~used).flatten().nonzero()[:, 0], 0.0)
    split = rearrange(flat, "(m s) (k g d) -> m k g s d", m=len(tokens), k=heads, d=x.shape[-1])
    return split.contiguous()


def _put_back(x: Tensor, rows: int, places: Tensor) -> Tensor:
    """float[M, K, G, S, D] -> float[B, T, K * G, D]."""
    flat = rearrange(x, "m k g s d -> (m s) (k g d)").index_select(0, places)
    return rearrange(flat, "(b t) (h d) -> b t h d", b=rows, d=x.shape[-1])


@torch.library.custom_op("flamingo::attend", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    tokens: Tensor,
    places: Tensor,
    used: Tensor,
    many: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What was looked up, the weights of all parts of `many` queries one after the other, and the queries,
    keys and values in blocks."""
    turned = (rearrange(x, "b h t d -> b t h d") for x in (query, key, value))
    q, k, v = (_taken(x, key.shape[1], tokens) for x in turned)
    k, v = k[:, :, 0], v[:, :, 0]
    out, weights = attended(q, k, v, mask, in_parts(q.shape[3], k.shape[2], many))
    return _put_back(out, len(query), places), torch.cat([x.flatten() for x in weights]), q, k, v


@torch.library.custom_op("flamingo::attend_backward", mutates_args=())
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    tokens: Tensor,
    places: Tensor,
    used: Tensor,
    many: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """float[B, T, H, D], and what `_forward` gave -> of queries float[B, T, H, D], of keys and of values
    float[B, T, K, D]."""
    above = _taken(grad, key.shape[1], tokens, used)
    parts, rows = in_parts(query.shape[3], key.shape[2], many), query.shape[:3]
    shapes = [(*rows, some.stop - some.start, seen.stop) for some, seen in parts]
    pieces = weights.split([math.prod(shape) for shape in shapes])
    of_part = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
    of_query, of_key, of_value = gradients_of(above, query, key, value, of_part, parts)
    found = (of_query, of_key[:, :, None], of_value[:, :, None])
    first, second, third = (_put_back(x, len(grad), places) for x in found)
    return first, second, third


@_forward.register_fake
def _(query, key, value, mask, tokens, places, used, many):
    batch, heads, queries, width = query.shape
    shared, (blocks, size) = key.shape[1], tokens.shape
    grouped = query.new_empty(blocks, shared, heads // shared, size, width)
    parts = (size + many - 1) // many
    longest = (size + parts - 1) // parts  # as `in_parts`, of sizes that need not be known
    compared = longest * longest * (parts * (parts - 1) // 2) + (size - longest * (parts - 1)) * size
    weights = query.new_empty(blocks * heads * compared)
    of_keys = (x.new_empty(blocks, shared, size, width) for x in (key, value))
    return query.new_empty(batch, queries, heads, width), weights, grouped, *of_keys


@_backward.register_fake
def _(grad, query, key, value, weights, tokens, places, used, many):
    batch, queries, _, width = grad.shape
    of_keys = (x.new_empty(batch, queries, x.shape[1], width) for x in (key, value))
    return torch.empty_like(grad, memory_format=torch.contiguous_format), *of_keys


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *_, tokens, places, used, ctx.many = inputs
    _, weights, query, key, value = output
    ctx.save_for_backward(query, key, value, weights, tokens, places, used)


def _gradients(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    found = _backward(grad, *ctx.saved_tensors, ctx.many)
    return *(rearrange(x, "b t h d -> b h t d") for x in found), *[None] * 5


_forward.register_autograd(_gradients, setup_context=_keep)

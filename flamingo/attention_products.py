"""Attention as plain matrix products, with the gradients of exactly what was computed. Knows no other room.

B rows, K heads of keys and values, G queries' heads that share one of them, T queries, C keys, D head
width. Heads that share keys are queries of one product: nothing is repeated, and no share is added up.
Queries come here scaled.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

LEARNED = 128  # queries of a part with gradients
Parts = list[tuple[slice, slice]]  # queries of a part, and the keys that any of them sees


def softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Weights in the dtype of the scores, which are lost; a softmax of any dtype reckons in float32."""
    dtype = scores.dtype
    if mask is not None:
        scores = scores.add_(mask) if mask.dtype == dtype else scores + mask
    return scores.softmax(dim=-1).to(dtype)


def weights_of(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """float[B, K, G, T, D], float[B, K, C, D] -> float[B, K, G, T, C] in the dtype of the queries.

    mask: float[B or 1, 1, T or 1, C], added to the scores.
    """
    scores = _by_head(_as_rows(query) @ key.transpose(-1, -2), query.shape[2])
    return softmax(scores, None if mask is None else rearrange(mask, "b 1 t c -> b 1 1 t c"))


def looked_up(weights: Tensor, value: Tensor) -> Tensor:
    """float[B, K, G, T, C], float[B, K, C, D] -> float[B, K, G, T, D]."""
    return _by_head(_as_rows(weights) @ value, weights.shape[2])


def gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of (scaled) queries, keys and values, by float[B, K, G, T, D] of what was looked up."""
    grad, rows = _as_rows(grad), _as_rows(weights)
    inner = grad @ value.transpose(-1, -2)
    scores = torch.ops.aten._softmax_backward_data(inner, rows, -1, rows.dtype)
    of_query = _by_head(scores @ key, weights.shape[2])
    return of_query, scores.transpose(-1, -2) @ _as_rows(query), rows.transpose(-1, -2) @ grad


def attended(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, parts: Parts
) -> tuple[Tensor, list[Tensor]]:
    """What was looked up, float[B, K, G, T, D], and the weights of each part of the queries.

    In parts, the scores stay in the processor's cache: most of the time of rows of some hundred tokens is
    not in their products, but in what is done to each score.
    """
    weights, out = [], []
    for some, seen in parts:
        of_part = None if mask is None else mask[:, :, some, seen]
        weights.append(weights_of(query[:, :, :, some], key[:, :, seen], of_part))
        out.append(looked_up(weights[-1], value[:, :, seen]))
    return (torch.cat(out, dim=3) if len(parts) > 1 else out[0]), weights


def gradients_of(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, weights: Sequence[Tensor], parts: Parts
) -> tuple[Tensor, Tensor, Tensor]:
    """`gradients` of what `attended` gave."""
    if len(parts) == 1:
        return gradients(grad, query, key, value, weights[0])
    # Of keys and values each part has a share: the shares are added in float32 or more.
    sums = [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (key, value)]
    found = []
    for (some, seen), part in zip(parts, weights, strict=True):
        of_query, of_key, of_value = gradients(
            grad[:, :, :, some], query[:, :, :, some], key[:, :, seen], value[:, :, seen], part
        )
        found.append(of_query)
        sums[0][:, :, seen] += of_key
        sums[1][:, :, seen] += of_value
    of_key, of_value = (x.to(like.dtype) for x, like in zip(sums, (key, value), strict=True))
    return torch.cat(found, dim=3), of_key, of_value


class Attention(torch.autograd.Function):
    """Keeps the weights for the backward pass once, in the dtype of the queries, those of the parts.

    Autograd would keep them in float32 as well, three times the memory: in a packed row, that is
    most of what a frozen layer holds.
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, parts: Parts):
        """What was looked up, and the weights where there is one part."""
        out, weights = attended(query, key, value, mask, parts)
        ctx.save_for_backward(query, key, value, *weights)
        ctx.parts = parts
        if len(parts) > 1:
            return out, None
        ctx.mark_non_differentiable(*weights)
        return out, weights[0]

    @staticmethod
    def backward(ctx, *grads: Tensor):
        query, key, value, *weights = ctx.saved_tensors
        return *gradients_of(grads[0], query, key, value, weights, ctx.parts), None, None


def in_parts(queries: int, keys: int, many: int) -> Parts:
    """Causal rows: at most so many queries at a time, all parts about as long, with the keys up to the last
    of them."""
    size = -(-queries // max(1, -(-queries // many)))
    some = [slice(start, min(start + size, queries)) for start in range(0, queries, size)]
    return [(part, slice(0, keys - queries + part.stop)) for part in some]


def all_at_once(queries: int, keys: int) -> Parts:
    return [(slice(0, queries), slice(0, keys))]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """float[N, H, Q, D] x float[N, H, K, D] -> float[N, Q, H*D]; mask: bool[N, 1, 1, K], True
    where a key may be seen (None: all may)."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else q.dtype
    if q.device.type == "cpu":
        return _attend_by_products(q, k, v, mask, dtype)
    out = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), attn_mask=mask)
    return rearrange(out, "n h q d -> n q (h d)")


def _attend_by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`attend` on a CPU, where torch's own keeps scaled copies, and does half precision by way of float32."""
    q, k, v = (q * q.shape[-1] ** -0.5).to(dtype), k.to(dtype), v.to(dtype)
    added = None
    if mask is not None:
        added = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
    parts = all_at_once(q.shape[2], k.shape[2])
    out, _ = Attention.apply(q[:, :, None], k, v, added, parts)  # type: ignore[misc]
    return rearrange(out, "n h 1 q d -> n q (h d)")


def _as_rows(x: Tensor) -> Tensor:
    return rearrange(x, "b k g t d -> b k (g t) d")


def _by_head(x: Tensor, groups: int) -> Tensor:
    return rearrange(x, "b k (g t) d -> b k g t d", g=groups)

"""How the frozen LM attends on a CPU: plain products, in the LM's own dtype.

torch's fused kernel is made for long rows on many cores: with one query its time is mostly
packing, and backwards it takes many times the products themselves.
B rows, H heads, K heads of keys and values (H = K * G), T queries, C keys, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from flamingo.attention_blocks import Blocks, blocks_of

NAME = "plain"
READ = 64  # queries of a part, in `read`
LEARNED = 128  # queries of a part with gradients
_CAUSAL: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """float[B, H, T, D] queries, float[B, K, C, D] keys and values -> float[B, T, H, D], weights
    (of packed rows those within the blocks that are computed; None where it is done in parts).

    attention_mask: float[B or 1, 1, T, C], added to the scores.
    """
    if unknown := [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]:
        raise ValueError(f"attn_implementation={NAME!r} knows no {', '.join(unknown)}: choose 'eager'")
    batch, heads, queries, width = query.shape
    groups = heads // key.shape[1]
    factor: float = width**-0.5 if scaling is None else scaling
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    blocks = None
    if attention_mask is not None and attention_mask.shape[2:] == (queries, key.shape[2]):
        # With a cache there are more keys than queries, and no row holds several documents.
        packed = len(attention_mask) == batch and queries == key.shape[2] and queries > 1
        blocks = _blocks(attention_mask) if packed else None
        dropping = dropout > 0 and module.training
        if blocks is None and not dropping and _only_read(query, key, value) and is_causal(attention_mask):
            return read(query, key, value, attention_mask, factor), None
    elif attention_mask is not None:
        attention_mask = attention_mask[..., : key.shape[2]]
    if queries == 1:  # heads that share keys are queries of one product: nothing is repeated
        query = rearrange(query, "b (k g) 1 d -> b k g d", g=groups)
    elif groups > 1:
        key, value = (repeat(x, "b k c d -> b (k g) c d", g=groups) for x in (key, value))
    if blocks is not None:
        query, key, value = (blocks.gather(x) for x in (query, key, value))
        attention_mask = blocks.mask
    if dropout and module.training:
        weights = F.dropout(_weights(query, key, attention_mask, factor), dropout)
        out = weights @ value
    else:
        out, weights = _Attention.apply(query, key, value, attention_mask, factor)  # type: ignore[misc]
    if queries == 1:
        out, weights = out.view(batch, heads, 1, -1), weights.view(batch, heads, 1, -1)
    if blocks is not None:
        return blocks.scatter(out, batch), weights
    return rearrange(out, "b h t d -> b t h d").contiguous(), weights


def _blocks(mask: Tensor) -> Blocks | None:
    """Within torch.compile those that the mask brings with it: finding them would break the graph."""
    return getattr(mask, "blocks", None) if torch.compiler.is_compiling() else blocks_of(mask)


def mask_with_blocks(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask that is added to the scores; of rows that are learned from, with its blocks."""
    mask = eager_mask(*args, **kwargs)
    if mask is not None and torch.is_grad_enabled() and mask.shape[2] == mask.shape[3] > 1:
        mask.blocks = blocks_of(mask)  # type: ignore[attr-defined]
    return mask


def _only_read(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Several tokens, without gradients."""
    learned = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    return query.shape[2] > 1 and not learned and not torch.compiler.is_compiling()


def is_causal(mask: Tensor) -> bool:
    """Whether no query of float[B, 1, T, C] sees a key after itself; asked once per mask, as all layers
    of a pass get the same."""
    if mask not in _CAUSAL:
        queries, keys = mask.shape[2:]
        after = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).triu(keys - queries + 1)
        _CAUSAL[mask] = not bool(((mask > torch.finfo(mask.dtype).min / 2) & after).any())
    return _CAUSAL[mask]


def read(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Causal attention without gradients: float[B, H, T, D], float[B, K, C, D] -> float[B, T, H, D].

    Some queries at a time, with the keys up to the last of them: what nobody sees is not computed,
    and the scores stay in the processor's cache. Heads that share keys are queries of one product.
    """
    groups, queries, keys = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    query = rearrange(query * scaling, "b (k g) t d -> b k g t d", g=groups)
    key = key.transpose(-1, -2)
    parts = []
    for some, seen in _parts(queries, keys, READ):
        scores = rearrange(query[:, :, :, some], "b k g t d -> b k (g t) d") @ key[..., seen]
        scores = rearrange(scores, "b k (g t) c -> b k g t c", g=groups)
        weights = _softmax(scores, mask[:, :, None, some, seen])
        looked = rearrange(weights, "b k g t c -> b k (g t) c") @ value[:, :, seen]
        parts.append(rearrange(looked, "b k (g t) d -> b t (k g) d", g=groups))
    return torch.cat(parts, dim=1)


def _parts(queries: int, keys: int, many: int) -> list[tuple[slice, slice]]:
    """Causal rows: so many queries at a time, with the keys up to the last of them."""
    some = [slice(start, min(start + many, queries)) for start in range(0, queries, many)]
    return [(part, slice(0, keys - queries + part.stop)) for part in some]


def _softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Weights in the dtype of the scores, which are lost; a softmax of any dtype reckons in float32."""
    dtype = scores.dtype
    if mask is not None:
        scores = scores.add_(mask) if mask.dtype == dtype else scores + mask
    return scores.softmax(dim=-1).to(dtype)


def _weights(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """float[B, H, T, C] in the dtype of the queries."""
    return _softmax(query * scaling @ key.transpose(-1, -2), mask)


def _learned_parts(queries: int, keys: int, mask: Tensor | None) -> list[tuple[slice, slice]]:
    """All at once where the mask lets queries see further than themselves, and in a graph, which would be
    another for every length."""
    if mask is None or queries <= LEARNED or torch.compiler.is_compiling() or not is_causal(mask):
        return [(slice(0, queries), slice(0, keys))]
    return _parts(queries, keys, LEARNED)


class _Attention(torch.autograd.Function):
    """Keeps the weights for the backward pass once, in the LM's dtype, those that causality leaves.

    Autograd would keep them in float32 as well, three times the memory: in a packed row, that is
    most of what a frozen layer holds. In parts, the scores stay in the processor's cache: most of the
    time of rows of some hundred tokens is not in their products, but in what is done to each score.
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float):
        parts = _learned_parts(query.shape[2], key.shape[2], mask)
        weights, out = [], []
        for some, seen in parts:
            of_part = None if mask is None else mask[:, :, some, seen]
            weights.append(_weights(query[:, :, some], key[:, :, seen], of_part, scaling))
            out.append(weights[-1] @ value[:, :, seen])
        ctx.save_for_backward(query, key, value, *weights)
        ctx.scaling, ctx.parts = scaling, parts
        if len(parts) > 1:
            return torch.cat(out, dim=2), None
        ctx.mark_non_differentiable(*weights)
        return out[0], weights[0]

    @staticmethod
    def backward(ctx, *grads: Tensor):
        grad, _ = grads
        query, key, value, *weights = ctx.saved_tensors
        if len(weights) == 1:
            return *_gradients(grad, query, key, value, weights[0], ctx.scaling), None, None
        # Of keys and values each part has a share: the shares are added in float32.
        sums = [torch.zeros_like(x, dtype=torch.float32) for x in (key, value)]
        found = []
        for (some, seen), part in zip(ctx.parts, weights, strict=True):
            of_query, of_key, of_value = _gradients(
                grad[:, :, some], query[:, :, some], key[:, :, seen], value[:, :, seen], part, ctx.scaling
            )
            found.append(of_query)
            sums[0][:, :, seen] += of_key
            sums[1][:, :, seen] += of_value
        of_key, of_value = (x.to(like.dtype) for x, like in zip(sums, (key, value), strict=True))
        return torch.cat(found, dim=2), of_key, of_value, None, None


def _gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, weights: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of queries, keys and values, by float[B, H, T, D] of what was looked up."""
    inner = grad @ value.transpose(-1, -2)
    scores = torch.ops.aten._softmax_backward_data(inner, weights, -1, weights.dtype)
    turned = scores.transpose(-1, -2)
    return scores @ key * scaling, turned @ (query * scaling), weights.transpose(-1, -2) @ grad


def attend_plainly(language_model: Any) -> None:
    """On a CPU, let the LM attend by `plain_attention`; on an accelerator nothing changes.

    An LM that does not take torch's attention (soft-capped scores, sinks, ALiBi), or one way
    only, stays as it is.
    """
    if torch.cuda.is_available() or language_model.config._attn_implementation != "sdpa":
        return
    if not language_model._can_set_attn_implementation():
        return
    AttentionInterface.register(NAME, plain_attention)
    AttentionMaskInterface.register(NAME, mask_with_blocks)
    language_model.set_attn_implementation(NAME)

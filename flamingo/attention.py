"""How the frozen LM attends on a CPU: plain products, in the LM's own dtype.

torch's fused kernel is made for long rows on many cores: with one query its time is mostly
packing, and backwards it takes many times the products themselves.
B rows, H heads, K heads of keys and values (H = K * G), T queries, C keys, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from flamingo.attention_blocks import Blocks, blocks_of, is_causal, whole_rows
from flamingo.attention_graph import attend_in_blocks
from flamingo.attention_products import (
    LEARNED,
    Attention,
    Parts,
    all_at_once,
    in_parts,
    looked_up,
    weights_of,
)

NAME = "plain"
READ = 64  # queries of a part, in `read`


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
    groups, dropping = heads // key.shape[1], dropout > 0 and module.training
    factor: float = width**-0.5 if scaling is None else scaling
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    blocks = None
    if attention_mask is not None and attention_mask.shape[2:] == (queries, key.shape[2]):
        # With a cache there are more keys than queries, and no row holds several documents.
        packed = len(attention_mask) == batch and queries == key.shape[2] and queries > 1
        blocks = _blocks(attention_mask) if packed else None
        if blocks is None and not dropping and _only_read(query, key, value) and is_causal(attention_mask):
            return read(query, key, value, attention_mask, factor), None
    elif attention_mask is not None:
        attention_mask = attention_mask[..., : key.shape[2]]
    if blocks is not None and torch.compiler.is_compiling() and not dropping:
        return attend_in_blocks(query * factor, key, value, blocks), None
    if blocks is not None:
        query, key, value = (blocks.gather(x) for x in (query, key, value))
        attention_mask = blocks.mask
    query = rearrange(query * factor, "b (k g) t d -> b k g t d", g=groups)
    if dropping:
        weights = F.dropout(weights_of(query, key, attention_mask), dropout)
        out = looked_up(weights, value)
    else:
        parts = _learned_parts(query.shape[3], key.shape[2], attention_mask)
        out, weights = Attention.apply(query, key, value, attention_mask, parts)  # type: ignore[misc]
    out = rearrange(out, "b k g t d -> b (k g) t d")
    weights = None if weights is None else weights.flatten(1, 2)
    if blocks is not None:
        return blocks.scatter(out, batch), weights
    return rearrange(out, "b h t d -> b t h d").contiguous(), weights


def _blocks(mask: Tensor) -> Blocks | None:
    """Within torch.compile those that the mask brings with it: finding them would break the graph."""
    return getattr(mask, "blocks", None) if torch.compiler.is_compiling() else blocks_of(mask)


def mask_with_blocks(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask that is added to the scores; of rows that are learned from, with its blocks, so that rows
    with and without them are one compiled graph."""
    mask = eager_mask(*args, **kwargs)
    if mask is not None and torch.is_grad_enabled() and mask.shape[2] == mask.shape[3] > 1:
        mask.blocks = blocks_of(mask) or whole_rows(mask)  # type: ignore[attr-defined]
    return mask


def _only_read(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Several tokens, without gradients."""
    learned = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    return query.shape[2] > 1 and not learned and not torch.compiler.is_compiling()


def read(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Causal attention without gradients: float[B, H, T, D], float[B, K, C, D] -> float[B, T, H, D].

    Some queries at a time, with the keys up to the last of them: what nobody sees is not computed,
    and the scores stay in the processor's cache. Heads that share keys are queries of one product.
    """
    groups, queries, keys = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    query = rearrange(query * scaling, "b (k g) t d -> b k g t d", g=groups)
    parts = []
    for some, seen in in_parts(queries, keys, READ):
        weights = weights_of(query[:, :, :, some], key[:, :, seen], mask[:, :, some, seen])
        parts.append(rearrange(looked_up(weights, value[:, :, seen]), "b k g t d -> b t (k g) d"))
    return torch.cat(parts, dim=1)


def _learned_parts(queries: int, keys: int, mask: Tensor | None) -> Parts:
    """All at once where the mask lets queries see further than themselves, and in a graph, which would be
    another for every length."""
    if mask is None or queries <= LEARNED or torch.compiler.is_compiling() or not is_causal(mask):
        return all_at_once(queries, keys)
    return in_parts(queries, keys, LEARNED)


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

"""How the frozen LM attends on a CPU: plain products, in the LM's own dtype. Knows no other room.

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
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

NAME = "plain"


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """float[B, H, T, D] queries, float[B, K, C, D] keys and values -> float[B, T, H, D], weights.

    attention_mask: float[B or 1, 1, T, C], added to the scores.
    """
    if unknown := [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]:
        raise ValueError(f"attn_implementation={NAME!r} knows no {', '.join(unknown)}: choose 'eager'")
    batch, heads, queries, width = query.shape
    groups = heads // key.shape[1]
    if queries == 1:  # heads that share keys are queries of one product: nothing is repeated
        query = rearrange(query, "b (k g) 1 d -> b k g d", g=groups)
    elif groups > 1:
        key, value = (repeat(x, "b k c d -> b (k g) c d", g=groups) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * (width**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[2]]
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    weights = F.dropout(weights, dropout, module.training)
    out = weights @ value
    if queries == 1:
        out, weights = out.view(batch, heads, 1, -1), weights.view(batch, heads, 1, -1)
    return rearrange(out, "b h t d -> b t h d").contiguous(), weights


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
    AttentionMaskInterface.register(NAME, eager_mask)
    language_model.set_attn_implementation(NAME)

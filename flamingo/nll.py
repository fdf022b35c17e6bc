"""The negative log likelihood of targets, without what is large about it: float32 logits of them all,
or, from what goes into a frozen head, any logits of all words. Knows no other room.

M targets, M' rows, of which what is more than targets has no loss; W LM width, V vocabulary, A added tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NLL_ROWS = 64  # positions whose float32 logits exist at one time


class _TokenNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> Tensor:
        index = targets[:, None]
        parts = zip(logits.split(NLL_ROWS), index.split(NLL_ROWS), strict=True)
        nll = [-part.log_softmax(dim=-1, dtype=torch.float32).gather(1, wanted) for part, wanted in parts]
        found = torch.cat(nll)[:, 0] if nll else logits.new_zeros(0, dtype=torch.float32)
        total = found + logits.gather(1, index)[:, 0].float()
        ctx.save_for_backward(logits, targets, total)
        return found

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        logits, targets, total = ctx.saved_tensors
        out = torch.empty_like(logits)
        parts = (tensor.split(NLL_ROWS) for tensor in (logits, targets, total, grads[0], out))
        for rows, wanted, sums, grad, into in zip(*parts, strict=True):
            shares = (rows.float() - sums[:, None]).exp_()
            shares[torch.arange(len(rows), device=rows.device), wanted] -= 1
            into.copy_(shares.mul_(grad[:, None]))
        return out, None


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """float[M', V] logits, int64[M] -> float32[M], -log softmax of each target. What is more in the
    logits than there are targets has no loss and no gradient.

    As `cross_entropy` of float32 logits, but no float32 copy of them is made as a whole: with a
    vocabulary of 50,000 the three that it makes are the largest tensors of a training step.
    """
    filled = F.pad(targets, (0, len(logits) - len(targets)))
    return _TokenNLL.apply(logits, filled)[: len(targets)]  # type: ignore[index]


def head_words(device: torch.device) -> int:
    """Words whose logits exist at one time: on a CPU so few that they stay in its cache."""
    return 1024 if device.type == "cpu" else 4096


class _HeadNLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, weight: Tensor, bias: Tensor | None, hidden: Tensor, added: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        index, extra = targets[:, None], targets[:, None] - len(weight)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        mean = hidden.new_zeros(hidden.shape, dtype=wide) if any(ctx.needs_input_grad) else None
        top, total, own = _read(weight, bias, hidden, index, mean)
        rest = added.to(wide)
        log_sums = torch.cat((top + total.log(), rest), dim=1).logsumexp(dim=1, keepdim=True)
        if mean is not None:
            mean.mul_((top - log_sums).exp_())
            shares = (rest - log_sums).exp_()
            words = F.embedding(targets.clamp_max(len(weight) - 1), weight).masked_fill_(extra >= 0, 0.0)
            named = (torch.arange(added.shape[1], device=extra.device) == extra).to(wide)
            # Differences, since what is nearly right leaves little of two that are rounded.
            kept = mean - words, mean, shares - named, shares
            ctx.save_for_backward(*(x.to(y.dtype) for x, y in zip(kept, (hidden, hidden, added, added))))
        own = torch.where(extra < 0, own, rest.gather(1, extra.clamp_min(0)))
        return (log_sums - own)[:, 0].float(), log_sums[:, 0].float()

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple[None, None, Tensor | None, Tensor | None, None]:
        ways = [grad[:, None] if grad is not None else None for grad in grads]
        found = []
        for pair in (ctx.saved_tensors[:2], ctx.saved_tensors[2:]):
            parts = [x * grad for x, grad in zip(pair, ways, strict=True) if grad is not None]
            found.append(sum(parts[1:], parts[0]).to(pair[0].dtype) if parts else None)
        return None, None, found[0], found[1], None


def _read(
    weight: Tensor, bias: Tensor | None, hidden: Tensor, index: Tensor, mean: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The head's words once from the first to the last, as attention reads its keys.

    Returns, float[M', 1] each: the largest logit; the sum of all exponentials of what logits are below it;
    the logit of word `index` (0 where it is none). mean: float[M', W], becomes the sum of the words'
    rows, each times its exponential, where it is wanted.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    top = torch.full(index.shape, -torch.inf, dtype=wide, device=index.device)
    total, own = torch.zeros_like(top), torch.zeros_like(top)
    size = head_words(hidden.device)
    for begin in range(0, len(weight), size):
        part = weight[begin : begin + size]
        logits = F.linear(hidden, part, None if bias is None else bias[begin : begin + size])
        scores, place = logits.to(wide), index - begin
        here = (place >= 0) & (place < len(part))
        own = torch.where(here, scores.gather(1, place.clamp(0, len(part) - 1)), own)
        higher = torch.maximum(top, scores.amax(dim=1, keepdim=True))
        before, top = (top - higher).exp_(), higher
        shares = scores.sub_(top).exp_()
        total = total * before + shares.sum(dim=1, keepdim=True)
        if mean is not None:
            mean.mul_(before).add_(shares.to(logits.dtype) @ part)
    return top, total, own


def head_nll(
    weight: Tensor, bias: Tensor | None, hidden: Tensor, added: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """`token_nll` of what goes into a frozen head: float[M', W], int64[M] -> float32[M]; and log-sum-exp
    of its logits, float32[M].

    weight: float[V, W], bias: float[V], of the head, which get no gradient; added: float[M', A], logits of
    the added tokens, which follow the words. Logits exist for `head_words` words at a time, and the
    gradient is made at once in the forward pass: a softmax whose sum and weighted mean grow part by part
    (Milakov and Gimelshein 2018; Dao et al. 2022, section 3.1).
    """
    filled = F.pad(targets, (0, len(hidden) - len(targets)))
    nll, log_sums = _HeadNLL.apply(weight, bias, hidden, added, filled)  # type: ignore[misc]
    return nll[: len(targets)], log_sums[: len(targets)]


def loss_of(
    nll: Tensor | None, logits: Tensor, targets: Tensor, reduction: str
) -> tuple[Tensor, Tensor | None]:
    """float[] or float[M] loss of M targets, from their NLL where it is there already; float[1, M, V]
    of float[1, M', V] logits, which otherwise give it."""
    assert reduction in ("mean", "sum", "none"), reduction
    kept = logits[:, : len(targets)] if nll is None else None
    nll = token_nll(logits[0], targets) if nll is None else nll
    return nll if reduction == "none" else nll.mean() if reduction == "mean" else nll.sum(), kept

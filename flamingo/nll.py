"""The negative log likelihood of targets, without what is large about it: float32 logits of them all,
or, from what goes into a frozen head, any logits of them all. Knows no other room.

M targets, M' rows, of which what is more than targets has no loss; W LM width, V vocabulary, A added tokens.
"""

from __future__ import annotations

from collections.abc import Callable

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


def head_rows(dtype: torch.dtype) -> int:
    """Positions whose logits exist at one time: 256 in half precision, and as many bytes of others."""
    return 512 // dtype.itemsize


class _HeadNLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, head: Callable[[Tensor], Tensor], hidden: Tensor, added: Tensor, targets: Tensor
    ) -> Tensor:
        wanted = any(ctx.needs_input_grad)
        rows = head_rows(added.dtype)
        parts = zip(hidden.split(rows), added.split(rows), targets.split(rows), strict=True)
        found = [_part(head, *part, wanted) for part in parts]
        nll, *grads = (torch.cat(x) for x in zip(*found, strict=True))
        ctx.save_for_backward(*grads)
        return nll

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[None, Tensor, Tensor, None]:
        hidden, added = ((x * grads[0][:, None]).to(x.dtype) for x in ctx.saved_tensors)
        return None, hidden, added, None


def _part(
    head: Callable[[Tensor], Tensor], hidden: Tensor, added: Tensor, targets: Tensor, wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """float32[P] NLL of P rows and, where wanted, its gradients: float[P, W] and float[P, A]."""
    with torch.set_grad_enabled(wanted):
        hidden = hidden.detach().requires_grad_(wanted)
        logits = head(hidden)
    words, nll = logits.shape[1], []
    grads = [torch.empty_like(x) for x in (logits, added)] if wanted else []
    # On a CPU so few rows at a time that their float32 logits stay in its cache.
    rows = 16 if logits.device.type == "cpu" else len(logits) or 1
    for begin in range(0, len(logits), rows):
        part = slice(begin, begin + rows)
        whole = logits.new_empty(len(logits[part]), words + added.shape[1], dtype=torch.float32)
        whole[:, :words], whole[:, words:] = logits.detach()[part], added[part]
        shares, index = whole.log_softmax(dim=-1), targets[part, None]
        nll.append(-shares.gather(1, index)[:, 0])
        if wanted:
            shares.exp_().scatter_add_(1, index, shares.new_full(index.shape, -1.0))
            grads[0][part], grads[1][part] = shares[:, :words], shares[:, words:]
    found = torch.cat(nll) if nll else logits.new_zeros(0, dtype=torch.float32)
    if not wanted:
        return found, hidden, added
    (back,) = torch.autograd.grad(logits, hidden, grads[0])
    return found, back, grads[1]


def head_nll(head: Callable[[Tensor], Tensor], hidden: Tensor, added: Tensor, targets: Tensor) -> Tensor:
    """`token_nll` of what goes into a frozen head: float[M', W], int64[M] -> float32[M].

    head: float[P, W] -> logits float[P, V] of P rows, by themselves; its weights get no gradient. added:
    float[M', A], logits of the added tokens, which follow the words. Logits and their gradient exist
    for `head_rows` rows at a time, and the gradient is made at once in the forward pass.
    """
    filled = F.pad(targets, (0, len(hidden) - len(targets)))
    return _HeadNLL.apply(head, hidden, added, filled)[: len(targets)]  # type: ignore[index]


def loss_of(
    nll: Tensor | None, logits: Tensor, targets: Tensor, reduction: str
) -> tuple[Tensor, Tensor | None]:
    """float[] or float[M] loss of M targets, from their NLL where it is there already; float[1, M, V]
    of float[1, M', V] logits, which otherwise give it."""
    assert reduction in ("mean", "sum", "none"), reduction
    kept = logits[:, : len(targets)] if nll is None else None
    nll = token_nll(logits[0], targets) if nll is None else nll
    return nll if reduction == "none" else nll.mean() if reduction == "mean" else nll.sum(), kept

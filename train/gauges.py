"""What is measured at a step: plain functions of tensors and of the step's record.

Each costs one copy from the device at most. `gates` and `squared_norms` look at the model,
`derived` works out rates and shares from what the loop has counted.
B, T: rows and places of a forward pass.
"""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from flamingo.data.packing import Rows
from flamingo.expansion import row_length

COUNTS = ("samples", "tokens", "images")


def gates(blocks: nn.ModuleList) -> dict[str, list[float]]:
    """tanh of the gates of every block, the lowest block first: 0 is shut.

    Of a block with a gate per channel, the mean of |tanh|. Empty where a gate is not on this rank
    (ZeRO-3 without its small weights kept).
    """
    gated = [block for block in blocks if hasattr(block, "attn_gate")]  # other fusions have none
    both = [getattr(block, name).detach() for name in ("attn_gate", "ff_gate") for block in gated]
    if not both or not all(gate.numel() for gate in both):
        return {}
    open_ = [gate.float().tanh() for gate in both]
    means = [gate.reshape(()) if gate.numel() == 1 else gate.abs().mean() for gate in open_]
    values = [round(value, 5) for value in torch.stack(means).tolist()]
    return {"gate_attention": values[: len(gated)], "gate_feed_forward": values[len(gated) :]}


def squared_norms(groups: Mapping[str, Iterable[Tensor | None]], device: torch.device) -> Tensor:
    """Sum of squares of each group's gradients: float64[groups], in their order, on `device`.

    Where ranks hold parts of the gradients (ZeRO-2 and 3), the sum of this over the ranks is
    that of the whole. None and empty tensors count nothing. Nothing is copied from the device.
    """
    tensors, owner = [], []
    for number, gradients in enumerate(groups.values()):
        kept = [gradient.detach() for gradient in gradients if gradient is not None and gradient.numel()]
        tensors += kept
        owner += [number] * len(kept)
    sums = torch.zeros(len(groups), dtype=torch.float64, device=device)
    if tensors:
        norms = torch._foreach_norm(tensors, 2, dtype=torch.float32)  # type: ignore[attr-defined]
        squares = torch.stack([norm.to(device) for norm in norms]).double().square()
        sums.index_add_(0, torch.tensor(owner, device=device), squares)
    return sums


def norms(names: Iterable[str], squares: Tensor) -> dict[str, float]:
    """Norm of each group, of `squared_norms` in the order of `names`: one copy from the device."""
    roots = squares.sqrt().tolist()
    return {name: float(f"{root:.6g}") for name, root in zip(names, roots, strict=True)}


@dataclass(frozen=True)
class Held:
    """What rows hold. tokens: in them, without padding, an <image> one; read_tokens: the same as the LM reads
    them; pairs: of tokens of one document as the LM reads them; row_places: B x T of the rows as it reads
    them: with the tokens read, it gives the padding's share."""

    tokens: int = 0
    read_tokens: int = 0
    pairs: int = 0
    row_places: int = 0

    def __add__(self, other: Held) -> Held:
        return Held(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def held(passes: Sequence[Rows], image_token_id: int = -1, image_tokens: int = 1) -> Held:
    """Of all rows of a micro-batch, each <image> read as `image_tokens`."""
    return sum((_held(rows, image_token_id, image_tokens) for rows in passes), Held())


def _held(rows: Rows, image_token_id: int, image_tokens: int) -> Held:
    count, width = rows.input_ids.shape
    if rows.segment_ids is None:
        assert rows.attention_mask is not None
        document, inside = torch.zeros_like(rows.input_ids), rows.attention_mask != 0
    else:
        document, inside = rows.segment_ids, rows.segment_ids >= 0
    number = document + width * rearrange(torch.arange(count, device=document.device), "b -> b 1")
    more = (rows.input_ids == image_token_id).long() * (image_tokens - 1)
    lengths = torch.bincount(number[inside], weights=(1 + more)[inside].double())
    longest = width
    if image_tokens > 1:  # rows that grow with their images end where the longest does (`flamingo.expansion`)
        longest = row_length(int(((1 + more) * inside).sum(dim=1).max()), rows.segment_ids)
    return Held(int(inside.sum()), int(lengths.sum()), int(lengths.square().sum()), count * longest)


def memory_gb(device: torch.device) -> float:
    """Most memory that was in use, in 1e9 bytes: allocated on the GPU, or resident in RAM.

    Since the process began, of this process alone (processes that load data are not in it).
    """
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)


def derived(
    record: Mapping[str, Any], *, flops: float | None = None, peak: float | None = None
) -> dict[str, float]:
    """Rates and shares of one step, to be added to its record.

    Args:
        record: `seconds` of the whole step with the wait for data, `data_seconds` of that wait;
            `samples`, `tokens`, `images` and `row_places` over all ranks, each where it is counted;
            `read_tokens`, those that the LM reads.
        flops: what the model has to compute in this step, over all ranks.
        peak: FLOP/s that all ranks' devices together reach in matrix products, as measured.

    Returns `samples_per_second` and so on; `data_share` and `padding_share` in 0..1;
    `flops_per_second`, and `peak_share` of the peak. What cannot be told is left out.
    """
    seconds = record.get("seconds") or 0.0
    out: dict[str, float] = {}
    if seconds > 0:
        for name in COUNTS:
            if name in record:
                out[f"{name}_per_second"] = round(record[name] / seconds, 3)
        if "data_seconds" in record:
            out["data_share"] = round(min(1.0, record["data_seconds"] / seconds), 4)
        if flops is not None:
            out["flops_per_second"] = float(f"{flops / seconds:.5g}")
            if peak and math.isfinite(peak):
                out["peak_share"] = round(flops / seconds / peak, 4)
    if record.get("row_places") and "tokens" in record:
        read = record.get("read_tokens", record["tokens"])
        out["padding_share"] = round(1.0 - read / record["row_places"], 4)
    return out

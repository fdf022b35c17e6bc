"""The optimizer's state by the names of parameters, whatever ZeRO made of it.

DeepSpeed keeps Adam's moments in one flat tensor per parameter group, cut among the ranks. Here
each trained parameter has its own: float32 tensors of its shape under `KEYS`, and the number of
updates under "step". So a checkpoint fits any number of ranks and any stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

KEYS = ("exp_avg", "exp_avg_sq")
STEP = "step"


class Moments:
    """Reads and writes them. All ranks call, for the same parameters in the same order.

    engine: DeepSpeed's, around trained parameters `named`; stage: of ZeRO.
    """

    def __init__(self, engine: Any, named: Mapping[str, nn.Parameter], stage: int):
        self.stage, self.named = stage, named
        self.outer = engine.optimizer
        self.inner: torch.optim.Optimizer = self.outer.optimizer if stage else self.outer
        self.home = {id(p): flat for flat, group in self._flats() for p in group}

    def _flats(self) -> Iterator[tuple[Tensor, list[nn.Parameter]]]:
        """The tensors that the inner optimizer steps, and the parameters in each."""
        if not self.stage:
            yield from ((p, [p]) for p in self.named.values())
        elif self.stage < 3:
            yield from zip(self.outer.single_partition_of_fp32_groups, self.outer.bit16_groups, strict=True)
        else:
            yield from zip(self.outer.fp32_partitioned_groups_flat, self.outer.fp16_groups, strict=True)

    def read(self, name: str) -> dict[str, Tensor]:
        """Moments and step of one parameter, on every rank; zeros before its first update."""
        parameter = self.named[name]
        state = self.inner.state.get(self.home[id(parameter)], {})
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if STEP not in state:
            return {**{key: torch.zeros(shape) for key in KEYS}, STEP: torch.zeros(())}
        step = torch.as_tensor(state[STEP], dtype=torch.float32).cpu().reshape(()).clone()
        return {**{key: self._read(parameter, state, key) for key in KEYS}, STEP: step}

    def _read(self, parameter: nn.Parameter, state: Mapping[str, Tensor], key: str) -> Tensor:
        if not self.stage:
            return state[key]
        if self.stage == 3:
            from deepspeed.utils import safe_get_full_optimizer_state

            found = safe_get_full_optimizer_state(parameter, key)
            assert found is not None
            return found
        # Not by DeepSpeed's own function: it links only the first group's state to its parameters.
        whole = torch.zeros(parameter.numel(), device=parameter.device)
        if piece := _piece(parameter, whole, state[key]):
            piece[0].copy_(piece[1])
        torch.distributed.all_reduce(whole)
        return whole.view_as(parameter)

    def write(self, name: str, values: Mapping[str, Tensor]) -> None:
        """What `read` gave."""
        if float(values[STEP]) == 0:  # never updated: the optimizer begins by itself
            return
        parameter = self.named[name]
        flat = self.home[id(parameter)]
        state = self.inner.state[flat]
        if STEP not in state:
            state[STEP] = values[STEP].clone().to(flat.device)
            state.update({key: torch.zeros_like(flat) for key in KEYS})
        for key in KEYS:
            self._write(parameter, state, key, values[key])

    def _write(self, parameter: nn.Parameter, state: Mapping[str, Tensor], key: str, value: Tensor) -> None:
        if not self.stage:
            state[key].copy_(value)
        elif self.stage == 3:
            self._write_piece(parameter, key, value)
        elif piece := _piece(parameter, value.flatten(), state[key]):
            piece[1].copy_(piece[0])

    def _write_piece(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        """ZeRO-3: this rank's piece of a parameter, the last one filled up with zeros."""
        from deepspeed.utils import safe_set_local_optimizer_state

        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        start = size * torch.distributed.get_rank()
        piece = value.new_zeros(size)
        own = value.flatten()[start : start + size]
        piece[: len(own)] = own
        safe_set_local_optimizer_state(parameter, piece.to(parameter.device), key)


def _piece(parameter: nn.Parameter, whole: Tensor, flat: Tensor) -> tuple[Tensor, Tensor] | None:
    """ZeRO-1 and 2: this rank's piece of a parameter, in the whole of it and in the flat tensor."""
    mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    there, here = mapping.lp_fragment_address, mapping.hp_fragment_address
    return whole.narrow(0, there.start, there.numel), flat.narrow(0, here.start, here.numel)

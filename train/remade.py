"""Outputs of activation functions, made again in the backward pass in place of kept. Knows no other room.

A product with an activation, or a trained layer after it, keeps its output for the backward pass, and the
activation itself its input. One elementwise function of the second gives the first again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Remade = tuple[Callable[[Tensor], Tensor], Tensor]
# The same numbers in the same order: a product of more than two dimensions flattens what it keeps.
RESHAPED = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")


def remade_activations() -> AbstractContextManager[Any]:
    """Within this `with`, a forward pass keeps no output of SiLU or GELU."""
    return torch.autograd.graph.saved_tensors_hooks(packed, unpacked)


def packed(saved: Tensor) -> Tensor | Remade:
    """What is kept in place of `saved`: itself, or how it is made from what is kept anyway."""
    made_by: Any = saved.grad_fn
    while made_by and made_by.name() in RESHAPED:
        made_by = made_by.next_functions[0][0]
    name = made_by.name() if made_by else ""
    if name == "SiluBackward0":
        function: Callable[[Tensor], Tensor] = F.silu
    elif name == "GeluBackward0":
        function = partial(F.gelu, approximate=made_by._saved_approximate)
    else:
        return saved
    # Of the saved shape: elementwise, an activation does not mind.
    return function, made_by._saved_self.detach().reshape(saved.shape)


def unpacked(kept: Tensor | Remade) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    function, given = kept
    return function(given)

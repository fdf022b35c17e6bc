"""Outputs of activation functions, made again in the backward pass in place of kept. Knows no other room.

A product with an activation, or a trained layer after it, keeps its output for the backward pass, and the
activation itself its input. One elementwise function of the second gives the first again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# The same numbers in the same order: a product of more than two dimensions flattens what it keeps.
RESHAPED = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")


class Kept(NamedTuple):
    """What was saved: `given`, or function(given) in the shape that it had. version: of `given` then, since
    autograd leaves it to whoever packs to see that nobody has written into it."""

    function: Callable[[Tensor], Tensor] | None
    given: Tensor
    version: int
    shape: torch.Size


def remade_activations() -> AbstractContextManager[Any]:
    """Within this `with`, a forward pass keeps no output of SiLU or GELU."""
    return torch.autograd.graph.saved_tensors_hooks(packed, unpacked)


def packed(saved: Tensor) -> Kept:
    """What is kept in place of `saved`: itself, or how it is made from what is kept anyway."""
    made_by: Any = saved.grad_fn
    while made_by and made_by.name() in RESHAPED:
        made_by = made_by.next_functions[0][0]
    name = made_by.name() if made_by and not saved._version else ""  # else somebody wrote into what it made
    if name == "SiluBackward0":
        function: Callable[[Tensor], Tensor] | None = F.silu
    elif name == "GeluBackward0":
        function = partial(F.gelu, approximate=made_by._saved_approximate)
    else:
        function = None
    given = made_by._saved_self.detach() if function else saved
    return Kept(function, given, given._version, saved.shape)


def unpacked(kept: Kept) -> Tensor:
    """Raises RuntimeError where what is kept was written into since, as autograd does."""
    if kept.given._version != kept.version:
        raise RuntimeError(
            f"a tensor of shape {list(kept.shape)} that the backward pass needs has been modified by an "
            f"inplace operation: it is at version {kept.given._version}, not {kept.version}"
        )
    # Of the saved shape: elementwise, an activation does not mind.
    return kept.function(kept.given.reshape(kept.shape)) if kept.function else kept.given

"""Running a model without its weights, and counting what would be held in memory.

Numbers that decide what is computed (token ids, which image a token sees) are real; everything
with weights or pictures in it is a shape of torch's FakeTensorMode: no memory, no arithmetic.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
# Indexing by bool[...]: how many rows come out depends on the numbers.
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


class Shapes(TorchDispatchMode):
    """Within this mode, operations on shapes give shapes, and on numbers numbers.

    Attributes:
        live: bytes of all tensors that are held, of those made or shown (`see`) within the mode.
        peak: the most that `live` has been.
    """

    def __init__(self, fake: FakeTensorMode):
        super().__init__()
        self.fake, self.live, self.peak = fake, 0, 0
        self._seen: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()

    def see(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once, until it is gone."""
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        self._seen[storage] = None
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, storage.nbytes())

    def _gone(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        shapes = [x for x in given if isinstance(x, FakeTensor)]
        if shapes:
            if len(shapes) < len(given):
                args, kwargs = self._as_shapes(func, args, kwargs)
            with self.fake:
                out = func(*args, **kwargs)
        else:
            with unset_fake_temporarily():
                out = func(*args, **kwargs)
            if not given and isinstance(out, Tensor) and out.is_floating_point():
                out = self.fake.from_tensor(out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.see(tensor)
        return out

    def _as_shapes(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Arguments of which some are numbers: all as shapes, once it is known how many they pick."""
        if func in INDEXING:
            args = (args[0], self._places(args[1]), *args[2:])

        def shape(x: Any) -> Any:
            return self.fake.from_tensor(x) if isinstance(x, Tensor) and not isinstance(x, FakeTensor) else x

        return tree_map(shape, (args, kwargs))

    @staticmethod
    def _places(indices: Any) -> list[Any]:
        places = []
        for index in indices:
            if isinstance(index, Tensor) and not isinstance(index, FakeTensor) and index.dtype == torch.bool:
                with unset_fake_temporarily():
                    places.extend(index.nonzero(as_tuple=True))
            else:
                places.append(index)
        return places


@torch.no_grad()
def to_shapes(model: nn.Module, fake: FakeTensorMode) -> None:
    """Parameters and buffers of a model on the meta device become shapes that say they are on the CPU;
    tied ones stay one storage."""
    made: dict[int, tuple[Tensor, Tensor]] = {}

    def shape(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        if id(tensor) not in made:
            with fake:
                made[id(tensor)] = (torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu"), tensor)
        return made[id(tensor)][0]

    model._apply(shape)  # pyright: ignore[reportPrivateUsage]

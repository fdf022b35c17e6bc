"""Pictures of many prompts: each file is decoded and encoded once while there is room.

N pictures, L latents, W connector width, S pixels a side.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flamingo.serving.prompt import open_picture

CHUNK = 32  # pictures that the encoder takes at a time
ROOM = 1 << 30  # bytes of latents that are kept


class Pictures:
    """Latents of picture files; those not used for longest make room.

    encoded: pictures that went through the encoder; faults: what is wrong with files that cannot
    be read, which are tried once.
    """

    def __init__(self, model: Any, transform: Any, room: int = ROOM) -> None:
        self.model, self.transform, self.room = model, transform, room
        self.encoded = 0
        self.faults: dict[Path, str] = {}
        self._kept: OrderedDict[Path, Tensor] = OrderedDict()  # float[L, W] each

    def load(self, paths: Sequence[Path]) -> dict[Path, Tensor]:
        """float[L, W] of every picture that can be read; the others are in `faults`."""
        found: dict[Path, Tensor] = {}
        for path in dict.fromkeys(paths):
            if path in self._kept:
                self._kept.move_to_end(path)
                found[path] = self._kept[path]
        new = [p for p in dict.fromkeys(paths) if p not in found and p not in self.faults]
        for start in range(0, len(new), CHUNK):
            for path, latents in self._encode(new[start : start + CHUNK]).items():
                found[path] = self._kept[path] = latents
                most = max(1, self.room // (latents.numel() * latents.element_size()))
                while len(self._kept) > most:
                    self._kept.popitem(last=False)
        return found

    def _encode(self, paths: Sequence[Path]) -> dict[Path, Tensor]:
        with ThreadPoolExecutor(max(1, min(8, torch.get_num_threads()))) as pool:
            read = dict(zip(paths, pool.map(self._pixels, paths), strict=True))
        pixels = {path: x for path, x in read.items() if isinstance(x, Tensor)}
        self.faults |= {path: x for path, x in read.items() if isinstance(x, str)}
        if not pixels:
            return {}
        self.encoded += len(pixels)
        with torch.inference_mode():
            stacked = torch.stack(list(pixels.values())).to(self.model.device)
            grids = self.model.encode_images(stacked)
            latents = self.model.resampler(grids)
        return {path: x.clone() for path, x in zip(pixels, latents, strict=True)}

    def _pixels(self, path: Path) -> Tensor | str:
        try:
            return self.transform(open_picture(path))
        except ValueError as error:
            return str(error)

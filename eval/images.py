"""Pictures of an evaluation: each is encoded once, and projected for the gated blocks once.

N images, C images that there is room for, L latents, W resampler width, H heads, D head width,
S pixels a side.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from flamingo.data.transforms import decode_image
from flamingo.modeling import FlamingoForConditionalGeneration

Picture = Path | None  # None: a blank one, of the mean colour
ENCODE_CHUNK = 32  # pictures that the encoder takes at a time
GIB = 2**30
LATENTS_SHARE = 0.25  # of the memory; keys and values of all blocks are larger


def read_pixels(image: Picture, transform: Callable) -> Tensor:
    """float32[3, S, S]; zeros for a blank picture. Raises ValueError for a file that is no picture."""
    if image is None:
        return torch.zeros(3, transform.size, transform.size)  # type: ignore[attr-defined]
    try:
        return transform(decode_image(image.read_bytes()))
    except (OSError, ValueError) as error:
        raise ValueError(f"picture {image} cannot be read: {error}") from None


def default_gib(device: torch.device) -> float:
    """A tenth of a GPU's memory; on a CPU an eighth of the machine's, at most 4 GiB."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 10 / GIB
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 * GIB
    return min(4.0, machine / 8 / GIB)


class Images:
    """Latents by picture, and keys and values of all blocks in one table, whose rows batches name.

    Both are bounded: what was not used for longest makes room. What is asked for at one time is
    always there, even where it alone is more.
    """

    def __init__(
        self, model: FlamingoForConditionalGeneration, transform: Callable, gib: float | None = None
    ):
        """gib: memory for latents, keys and values together; None: `default_gib`."""
        gib = default_gib(model.device) if gib is None else gib
        if gib <= 0:
            raise ValueError(f"images_gib={gib}: must be more than 0")
        self.model, self.transform, self.bytes = model, transform, int(gib * GIB)
        self.encoded = 0  # pictures that went through the encoder so far
        self._latents: OrderedDict[Picture, Tensor] = OrderedDict()
        self._places: OrderedDict[Picture, int] = OrderedDict()  # rows of the table
        self._media: Any = None

    @property
    def media(self) -> Any:
        """The table: of C pictures what `model.media` gives; None before the first picture."""
        return self._media

    @property
    def room(self) -> int:
        """How many pictures' keys and values fit in memory."""
        size = next(self.model.resampler.parameters()).element_size()
        return max(1, int(self.bytes * (1 - LATENTS_SHARE) / (size * self.model.image_values)))

    def latents(self, images: Sequence[Picture]) -> Tensor:
        """float[N, L, W] of the pictures, in order."""
        held: dict[Picture, Tensor] = {}
        for image in dict.fromkeys(images):
            if image in self._latents:
                self._latents.move_to_end(image)
                held[image] = self._latents[image]
        for image, latent in self._encode([i for i in dict.fromkeys(images) if i not in held]):
            held[image] = self._latents[image] = latent
            most = max(1, int(self.bytes * LATENTS_SHARE) // (latent.numel() * latent.element_size()))
            while len(self._latents) > most:
                self._latents.popitem(last=False)
        return torch.stack([held[image] for image in images])

    def places(self, images: Sequence[Picture]) -> Tensor:
        """int64[N]: where in the table each picture's keys and values are now; of a picture of L
        <image> tokens where each token's vector is, int64[N * L]."""
        wanted = dict.fromkeys(images)
        for image in wanted:
            if image in self._places:
                self._places.move_to_end(image)  # what is wanted now does not make room
        new = [image for image in wanted if image not in self._places]
        room = max(self.room, len(wanted))
        while len(self._places) + len(new) > room:
            self._places.popitem(last=False)
        size = len(self._places) + len(new)
        for start in range(0, len(new), ENCODE_CHUNK):
            part = new[start : start + ENCODE_CHUNK]
            self._write(part, self.model.media(latents=self.latents(part)), size, room)
        places = [self._places[image] for image in images]
        each = self.model.image_tokens  # rows of the table that a picture has
        found = torch.tensor(places, dtype=torch.int64, device=self.model.device)
        rows = rearrange(found * each, "n -> n 1") + torch.arange(each, device=found.device)
        return rearrange(rows, "n l -> (n l)")

    def _write(self, images: list[Picture], media: Any, size: int, room: int) -> None:
        """Into free rows of the table, which is made larger where it has not `size` rows."""
        held = 0 if self._media is None else len(self._media.tables[0])
        if size > held:
            self._media = _table(media, self._media, min(room, max(2 * held, size)))
        assert self._media is not None
        taken = set(self._places.values())
        free = (place for place in range(len(self._media.tables[0])) if place not in taken)
        for image in images:
            self._places[image] = next(free)
        index = torch.tensor([self._places[image] for image in images], device=self.model.device)
        for new, table in zip(media.tables, self._media.tables, strict=True):
            table[index] = new

    def _encode(self, images: list[Picture]) -> Iterator[tuple[Picture, Tensor]]:
        for part, pixels in self._loaded(images):
            self.encoded += len(part)
            grids = self.model.encode_images(pixels.to(self.model.device))
            yield from zip(part, self.model.resampler(grids), strict=True)

    def _loaded(self, images: list[Picture]) -> Iterator[tuple[list[Picture], Tensor]]:
        """Pictures and float32[N, 3, S, S], a chunk at a time; threads read the next chunk meanwhile."""
        parts = [images[i : i + ENCODE_CHUNK] for i in range(0, len(images), ENCODE_CHUNK)]
        threads = torch.get_num_threads()
        if threads == 1 or len(images) < 2:
            for part in parts:
                yield part, torch.stack([read_pixels(image, self.transform) for image in part])
            return
        with ThreadPoolExecutor(min(8, threads)) as pool:
            pending = []
            for part in parts:
                pending.append((part, [pool.submit(read_pixels, image, self.transform) for image in part]))
                if len(pending) > 1:
                    first, tasks = pending.pop(0)
                    yield first, torch.stack([task.result() for task in tasks])
            for part, tasks in pending:
                yield part, torch.stack([task.result() for task in tasks])


def _table(like: Any, before: Any, size: int) -> Any:
    """Room for `size` pictures, the first of them as before."""
    grown = tuple(x.new_empty(size, *x.shape[1:]) for x in like.tables)
    for tensor, old in zip(grown, () if before is None else before.tables, strict=False):
        tensor[: len(old)] = old
    return like.of_tables(grown)

"""Patch grids of a frozen encoder, kept as shards beside the pictures' own.

A feature shard is a plain tar of KEY.safetensors, KEY being the content key of a picture and the
tensor `grid` its float[G, E]; features.json says which encoder made them. The source shards stay
what they are: whatever document shows a picture, its grid is found by its key.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from flamingo.data.shards import ShardSet

CARD = "features.json"
MEMBER = "safetensors"


class FeatureShards:
    """key in shards; shards[key] -> float[G, E], in the dtype that the encoder had.

    Args:
        folders: what `flamingo data features` wrote, one or several.
        encoder: what tells the encoder of now from others (`flamingo.features.fingerprint`).

    Raises:
        ValueError: no such folder, one that is not complete, or grids of another encoder.
    """

    def __init__(self, folders: str | Path | Sequence[str], encoder: Mapping[str, Any]) -> None:
        listed = [folders] if isinstance(folders, (str, Path)) else folders
        for folder in map(Path, listed):
            self._check(folder, read_card(folder)["encoder"], encoder)
        self.shards = ShardSet([str(Path(folder) / "*.tar") for folder in listed])
        self.places: dict[str, tuple[int, int]] = {}
        for shard, samples in enumerate(self.shards.keys()):
            self.places.update({key: (shard, number) for number, key in enumerate(samples)})

    @staticmethod
    def _check(folder: Path, held: Mapping[str, Any], encoder: Mapping[str, Any]) -> None:
        if different := [name for name in encoder if held.get(name) != encoder[name]]:
            told = "; ".join(f"{n} {held.get(n)!r}, not {encoder[n]!r}" for n in different)
            raise ValueError(
                f"features {folder} are of another encoder ({told}): make them again with "
                "`flamingo data features`, or remove `features` from the recipe"
            )

    def __contains__(self, key: str) -> bool:
        return key in self.places

    def __getitem__(self, key: str) -> Tensor:
        from safetensors.torch import load

        return load(self.shards.read(*self.places[key])[MEMBER])["grid"]


def read_card(folder: Path) -> dict[str, Any]:
    """What features.json says; raises ValueError where there is none."""
    try:
        card = json.loads((folder / CARD).read_bytes())
        return {"encoder": dict(card["encoder"]), **card}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"features {folder} hold no readable {CARD}: name a folder that `flamingo data features` "
            f"finished ({error})"
        ) from None


def members(grids: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Mapping[str, bytes]]]:
    """(key, float[G, E]) pairs -> samples of a feature shard."""
    from safetensors.torch import save

    for key, grid in grids:
        yield key, {MEMBER: save({"grid": grid.contiguous()})}

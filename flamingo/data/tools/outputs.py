"""A folder of shards that several processes fill, each shard complete or absent.

OUT/NAME-000000.tar ...    the shards
OUT/.cards/plan.json       what the shards are made of: another plan needs another folder
OUT/.cards/NAME-....json   one per finished shard: its checksum, and what its task returned
OUT/dataset.json           written once all shards are there
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flamingo.data.writing import CARD, DatasetCard, fingerprint, write_aside

CARDS = ".cards"
PLAN = "plan.json"


def claim(out: Path, plan: Mapping[str, Any]) -> None:
    """Make `out` the folder of this plan, or find that it is.

    Raises:
        ValueError: it is a file, holds something else, or shards of another plan.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: choose a folder for the shards")
    place = out / CARDS / PLAN
    if place.is_file():
        held = _read(place) or {}
        if different := sorted(n for n in {*held, *plan} if held.get(n) != plan.get(n)):
            told = ", ".join(f"{n} was {held.get(n)!r}, is {plan.get(n)!r}" for n in different)
            raise ValueError(f"{out} holds shards of another run ({told}): choose another folder")
        return
    if out.is_dir() and any(entry.name != CARDS for entry in out.iterdir()):
        raise ValueError(f"{out} is not empty and holds something else: choose another folder")
    place.parent.mkdir(parents=True, exist_ok=True)
    _write(place, plan)  # parts that start together write the same


def finished(out: Path, name: str, write: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
    """The card of shard `name`; `write(path)` makes the shard if it is not there yet, or altered.

    write: fills the file that it is given, and returns what the card should tell (JSON).
    """
    place, shard = out / CARDS / f"{name}.json", out / name
    card = _read(place)
    if card and shard.is_file() and fingerprint(shard) == {k: card.get(k) for k in ("bytes", "sha256")}:
        return card
    told = write_aside(shard, write)
    card = {**told, **fingerprint(shard)}
    _write(place, card)  # after the shard: a card says that its shard is complete
    return card


def finish(
    out: Path, names: Sequence[str], settings: Mapping[str, Any], licence: str = ""
) -> DatasetCard | None:
    """Write dataset.json if all shards are there; None as long as other parts are still at work."""
    cards = {name: _read(out / CARDS / f"{name}.json") for name in names}
    files = {
        name: {key: card[key] for key in ("samples", "bytes", "sha256")}
        for name, card in cards.items()
        if card and (out / name).is_file()
    }
    if len(files) < len(names):
        return None
    counts = {"shards": len(files), "samples": sum(int(file["samples"]) for file in files.values())}
    card = DatasetCard(settings, counts, files, licence)
    _write(out / CARD, vars(card))
    return card


def _read(place: Path) -> dict[str, Any] | None:
    try:
        held = json.loads(place.read_bytes())
    except (OSError, ValueError):
        return None
    return held if isinstance(held, dict) else None


def _write(place: Path, content: Mapping[str, Any]) -> None:
    def fill(path: Path) -> Mapping[str, Any]:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return {}

    write_aside(place, fill)

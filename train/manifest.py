"""What a run trains on, shards and pretrained weights: kept in its folder, compared when it goes on.

Positions are counted in the order that follows from the shards, so other shards mean that some
samples come twice and others never.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from flamingo.data.stream import Stream
from flamingo.data.writing import write_text
from flamingo.train.engine import gathered

FILE, BACKBONES = "shards.json", "backbones.json"
LOOKED_AT = 16  # numbers of each tensor: weights of another training differ in all
NAMED = 5  # shards that a message names

Manifest = dict[str, dict[str, str]]  # source -> shard -> digest


def manifest(streams: Iterable[Stream]) -> Manifest:
    """The shards of every source with their digests: of names and sizes, and of the content if known."""
    found: Manifest = {}
    for stream in streams:
        shards = stream.shards
        both = (f"{digest} {content}".strip() for digest, content in zip(shards.digests, shards.contents))
        found[stream.name] = dict(zip(shards.names, both, strict=True))
    return found


def check(run: Path, now: Manifest, accept: bool) -> None:
    """Remember the shards of a new run; those of a run that goes on must be the same.

    Raises ValueError, naming shards that were added, altered or removed, unless they are accepted.
    """
    held = run / FILE
    changes = _changes(json.loads(held.read_text()), now) if held.exists() else []
    if changes and not accept:
        more = f" and {len(changes) - NAMED} more" if len(changes) > NAMED else ""
        raise ValueError(
            f"the shards are not those that {run} began with: {'; '.join(changes[:NAMED])}{more}. Put them "
            "back, or go on with other samples in another order: --accept-changed-shards"
        )
    if changes or not held.exists():
        write_text(held, json.dumps(now, indent=1) + "\n")


def _changes(before: Manifest, now: Manifest) -> list[str]:
    found = []
    for source in now:
        old, new = before.get(source, {}), now[source]
        for words, shards in (
            ("was added", sorted(new.keys() - old.keys())),
            ("was removed", sorted(old.keys() - new.keys())),
            (
                "was altered",
                sorted(name for name in old.keys() & new.keys() if _altered(old[name], new[name])),
            ),
        ):
            found += [f"shard {name} of source {source!r} {words}" for name in shards]
    return found


def _altered(before: str, now: str) -> bool:
    """Whether sizes differ, or the content where both times somebody had read it."""
    (old, _, old_content), (new, _, new_content) = before.partition(" "), now.partition(" ")
    return old != new or bool(old_content and new_content and old_content != new_content)


def digest(weights: Iterable[tuple[str, nn.Parameter]]) -> str:
    """Of pretrained weights, by names, shapes and a few numbers of each tensor. All ranks call it: weights
    may be in pieces. Adapters are left out."""
    found = hashlib.sha256()
    for name, parameter in sorted(weights):
        if "lora_" in name:
            continue
        with gathered([parameter]):
            numbers = parameter.detach().flatten()
            some = numbers[:: max(1, len(numbers) // LOOKED_AT)].float().cpu()
            found.update(f"{name} {list(parameter.shape)}".encode() + some.numpy().tobytes())
    return found.hexdigest()[:32]


def check_backbones(run: Path, now: dict[str, str]) -> None:
    """Remember the backbones of a new run, digest by setting; those of a run that goes on must be the same.

    Raises ValueError, naming the setting.
    """
    held = run / BACKBONES
    before = json.loads(held.read_text()) if held.exists() else {}
    if other := [name for name in now if before.get(name, now[name]) != now[name]]:
        raise ValueError(
            f"{' and '.join(other)}: the weights are not those that {run} began with: put them back, or "
            "begin another run with run=FOLDER"
        )
    if now.keys() - before.keys():
        write_text(held, json.dumps(now, indent=1) + "\n")

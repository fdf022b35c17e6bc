"""Writing shards: the same samples give the same bytes, and a folder is complete or absent."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

CARD = "dataset.json"
V = TypeVar("V")

TarSample = tuple[str, Mapping[str, bytes]]  # key, member extension -> bytes
# track(items, what they are, how many) -> the same items; shows a progress bar on the way
Track = Callable[[Iterable[Any], str, int], Iterable[Any]]


def untracked(items: Iterable[Any], what: str, total: int) -> Iterable[Any]:
    """The `Track` that shows nothing."""
    return items


@dataclass(frozen=True)
class DatasetCard:
    """What dataset.json says about the folder that it lies in. `files`: name -> bytes, sha256."""

    settings: Mapping[str, str | int | None]
    counts: Mapping[str, int]
    files: Mapping[str, Mapping[str, str | int]]
    licence: str


def write_tars(
    folder: Path, family: str, samples: Iterable[TarSample], per_shard: int
) -> dict[str, dict[str, str | int]]:
    """Write FAMILY-000000.tar, FAMILY-000001.tar, ... of `per_shard` samples each.

    Returns:
        File name -> {"samples", "bytes", "sha256"}.
    """
    files: dict[str, dict[str, str | int]] = {}
    left = iter(samples)
    for first in left:
        path = folder / f"{family}-{len(files):06d}.tar"
        count = write_tar(path, chain([first], islice(left, per_shard - 1)))
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
        files[path.name] = {"samples": count, **fingerprint(path)}
    return files


def write_card(folder: Path, card: DatasetCard) -> None:
    """Write dataset.json: the last file, because it says that the others are complete."""
    with open(folder / CARD, "w", encoding="utf-8") as file:
        json.dump(asdict(card), file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def read_complete(out: Path, settings: Mapping[str, str | int | None]) -> DatasetCard | None:
    """The card of a complete folder that was written with these settings; None: nothing there.

    Raises:
        ValueError: `out` holds something else, or a file of it was altered or removed.
    """
    advice = "choose another folder, or delete this one"
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: choose a folder that does not exist yet")
    if not out.exists() or not any(out.iterdir()):
        return None
    try:
        card = DatasetCard(**json.loads((out / CARD).read_bytes()))
        different = [name for name in settings if card.settings.get(name) != settings[name]]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{out} holds something other than these shards: {advice}") from error
    if different:
        told = ", ".join(f"{n} {card.settings.get(n)}, not {settings[n]}" for n in different)
        raise ValueError(f"{out} holds shards with other settings ({told}): {advice}")
    for name, said in card.files.items():
        path = out / name
        if not path.is_file() or fingerprint(path) != {k: said.get(k) for k in ("bytes", "sha256")}:
            raise ValueError(f"{path} is missing or was altered: delete {out} and write it again")
    return card


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name if the block ends well.

    Raises:
        ValueError: `out` was filled by somebody else in the meantime.
    """
    parent = out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=parent))
    try:
        yield folder
        folder.chmod(0o755)  # mkdtemp keeps others out
        try:
            os.rename(folder, out.absolute())  # replaces an empty folder, and nothing else
        except OSError as error:
            raise ValueError(f"{out} could not take the finished shards: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_aside(path: Path, fill: Callable[[Path], V]) -> V:
    """`fill(temporary)` writes a file, which takes the name `path` if that ends well; its result.

    Several processes may write the same file at once: each has its own temporary one. What a
    process that was killed left of `path` goes.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    for left in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 12}"):
        _remove_unless_locked(left)
    try:
        with open(temporary, "wb") as mark:
            rights = os.fstat(mark.fileno()).st_mode & 0o777
            with suppress(OSError):  # a file system without locks; then nothing is cleared away either
                fcntl.flock(mark, fcntl.LOCK_EX)  # tells the living from what a killed process left
            told = fill(temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            temporary.chmod(rights)  # safetensors keeps all but its owner out
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)
    return told


def write_text(path: Path, text: str) -> None:
    """A text file that is complete or absent, see `write_aside`."""
    write_aside(path, lambda part: part.write_text(text, encoding="utf-8"))


def _remove_unless_locked(path: Path) -> None:
    with suppress(OSError), open(path, "rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()


def fsync_folder(folder: Path) -> None:
    """Make new names in a folder last, where the system lets folders be synced."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_tar(path: Path, samples: Iterable[TarSample]) -> int:
    """Write one tar whose bytes follow from the samples alone; how many there were."""
    from webdataset.writer import TarWriter  # pulls in torch and more

    count = 0
    # A fixed time and owner.
    with (
        open(path, "wb") as file,
        # keep_meta: members whose ending begins with "_" too.
        TarWriter(
            file, "flamingo", "flamingo", encoder=False, compress=False, mtime=0, keep_meta=True
        ) as tar,
    ):
        for key, members in samples:
            tar.write({"__key__": key, **members})
            count += 1
    return count


def fingerprint(path: Path) -> dict[str, str | int]:
    """{"bytes", "sha256"} of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}

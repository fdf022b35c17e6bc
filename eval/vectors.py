"""Vectors kept by what they were made of: each computed once, whoever wants it.

N items, D width of a vector.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from flamingo.data.writing import write_aside, write_text
from flamingo.eval.embedding import Encoder, Item, Part
from flamingo.runtime import cores

CHUNK = 256  # items of a file: what a killed process loses
SETTLED = 2.0  # seconds after which a file that is written again has another time


def text_key(text: str) -> str:
    """A text's name in a store of vectors."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def picture_keys(
    folder: Path, pictures: Iterable[Path], left_out: dict[Path, str] | None = None
) -> dict[Path, str]:
    """Digests of the content of pictures, 32 hex digits. Kept in the folder with size and time of each
    file, so that one that has not changed is read once, by one process.

    left_out: where given, files that cannot be read are entered there with the reason, and have no key.
    """
    memo = folder / "pictures.json"
    found: dict[Path, str] = {}
    (folder / "locks").mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "locks" / "pictures.lock"):
        known = _memo(memo)
        new = []
        for picture in dict.fromkeys(pictures):
            size, changed, key = known.get(str(picture.absolute()), (0, 0, ""))
            try:
                stat = picture.stat()
            except OSError as error:
                _leave_out(picture, error, left_out)
                continue
            if key and (size, changed) == (stat.st_size, stat.st_mtime_ns):
                found[picture] = key
            else:
                new.append((picture, stat.st_size, stat.st_mtime_ns))
        with ThreadPoolExecutor(min(8, cores())) as threads:
            keys = list(threads.map(_key_or_error, [picture for picture, _, _ in new]))
        for (picture, size, changed), key in zip(new, keys, strict=True):
            if isinstance(key, OSError):
                _leave_out(picture, key, left_out)
                continue
            found[picture] = key
            if time.time() - changed / 1e9 > SETTLED:
                known[str(picture.absolute())] = (size, changed, key)
        if new:
            write_text(memo, json.dumps(known))
    return found


def _leave_out(picture: Path, error: OSError, left_out: dict[Path, str] | None) -> None:
    if left_out is None:
        raise error
    left_out[picture] = error.strerror or str(error)


def _key_or_error(picture: Path) -> str | OSError:
    try:
        return _content_key(picture)
    except OSError as error:
        return error


def _content_key(picture: Path) -> str:
    return hashlib.sha256(picture.read_bytes()).hexdigest()[:32]


def _memo(file: Path) -> dict[str, tuple[int, int, str]]:
    """Nothing where it cannot be read: all it saves is time."""
    try:
        return {
            path: (int(size), int(at), str(key))
            for path, (size, at, key) in json.loads(file.read_text()).items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


class Vectors:
    """A folder of vectors by encoder and content, in safetensors files that are whole or absent.

    Several processes that want the same share the work: each file is computed by one of them.
    """

    def __init__(self, folder: Path, rank: int = 0, world: int = 1):
        self.folder, self.rank, self.world = folder, rank, world
        self._seen: set[Path] = set()  # a file never changes
        self._places: dict[str, dict[str, tuple[Path, int]]] = {}

    def get(
        self,
        encoder: Encoder,
        part: Part,
        items: Mapping[str, Item],
        keep: Collection[str] | None = None,
        left_out: dict[str, str] | None = None,
    ) -> np.ndarray:
        """float32[N, D] of the items `keep`, by key, in that order; None: all.

        left_out: where given, items that cannot be read are entered there with the reason, and have no
        row; they are not remembered, and tried again the next time.

        Every process must ask for the same items, in the same order: then the encoder's batches are
        the same however many processes there are.
        """
        stem = f"{part}-{encoder.digest(part)}"
        (self.folder / "locks").mkdir(parents=True, exist_ok=True)
        known = self._known(stem)
        keys = list(items)
        chunks = [keys[start : start + CHUNK] for start in range(0, len(keys), CHUNK)]
        left = [chunk for chunk in chunks if any(key not in known for key in chunk)]
        first = self.rank * len(left) // self.world
        left = left[first:] + left[:first]  # processes begin at different places
        quiet = self.rank > 0 or not sys.stderr.isatty() or not left
        make = partial(self._make, encoder, part, stem, items, left_out)
        with tqdm(total=sum(map(len, left)), desc=f"{part} vectors", unit="", disable=quiet) as bar:
            for wait in (False, True):
                left = [chunk for chunk in left if not make(chunk, wait, bar)]
        wanted = keys if keep is None else list(keep)
        return self._gather(stem, [key for key in wanted if not left_out or key not in left_out])

    def kept(self, part: Part, digest: str, keys: Sequence[str]) -> np.ndarray:
        """float32[N, D] of keys that an encoder with this digest was asked for before.

        Raises ValueError where some are not there.
        """
        stem = f"{part}-{digest}"
        known = self._known(stem)
        if missing := [key for key in keys if key not in known]:
            raise ValueError(
                f"{self.folder} lacks {len(missing):,} of {len(keys):,} vectors: files of it were removed; "
                "run the command that made it again"
            )
        return self._gather(stem, keys)

    def _make(
        self,
        encoder: Encoder,
        part: Part,
        stem: str,
        items: Mapping[str, Item],
        left_out: dict[str, str] | None,
        chunk: list[str],
        wait: bool,
        bar: tqdm,
    ) -> bool:
        """Whether the chunk is there now; not where another process is at it and this one does not wait."""
        lock = FileLock(self.folder / "locks" / f"{stem}-{_name(chunk)}.lock")
        try:
            lock.acquire(blocking=wait)
        except Timeout:
            return False
        try:
            known = self._known(stem)
            new = [key for key in chunk if key not in known]
            if left_out is None:
                vectors = encoder.embed(part, [items[key] for key in new]) if new else np.empty((0, 0))
            else:
                vectors, faults = encoder.embed_readable(part, [items[key] for key in new])
                left_out.update((new[place], why) for place, why in faults.items())
                new = [key for place, key in enumerate(new) if place not in faults]
            if new:
                file = self.folder / f"{stem}-{_name(new)}.safetensors"
                content = {"keys": "\n".join(new)}
                write_aside(file, lambda place: save_file({"vectors": vectors}, place, content))
            bar.update(len(chunk))
            return True
        finally:
            lock.release()

    def _known(self, stem: str) -> dict[str, tuple[Path, int]]:
        """Where the vector of each key lies: file and row."""
        found = self._places.setdefault(stem, {})
        for file in set(self.folder.glob(f"{stem}-*.safetensors")) - self._seen:
            with _opened(file) as content:
                keys = (content.metadata() or {}).get("keys", "").split("\n")
            found.update((key, (file, row)) for row, key in enumerate(keys))
            self._seen.add(file)
        return found

    def _gather(self, stem: str, keys: Sequence[str]) -> np.ndarray:
        known = self._known(stem)
        places: dict[Path, list[tuple[int, int]]] = {}
        for number, key in enumerate(keys):
            file, row = known[key]
            places.setdefault(file, []).append((number, row))
        out = np.empty((0, 0), np.float32)
        for file, rows in places.items():
            with _opened(file) as content:
                vectors = content.get_tensor("vectors")
            if not out.size:
                out = np.empty((len(keys), vectors.shape[1]), np.float32)
            numbers, at = (list(column) for column in zip(*rows, strict=True))
            out[numbers] = vectors[at]
        return out


def _name(keys: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16]


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, "numpy")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is damaged ({error}): delete it, and its vectors are computed anew"
        ) from None

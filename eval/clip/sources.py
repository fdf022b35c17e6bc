"""What commands are given: folders of pictures, shards, files of texts -> entries to embed.

Nothing is decoded here: an entry knows where its picture lies, and what its content is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from tqdm import tqdm

from flamingo.data.document import Clip, Document, Image, Text
from flamingo.data.errors import BadSample
from flamingo.data.kinds import _members, reader
from flamingo.data.shards import ShardSet
from flamingo.data.transforms import FORMATS, decoding_for
from flamingo.eval.embedding import Item
from flamingo.eval.vectors import picture_keys, text_key

ENDINGS = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"))
MAGIC = "*?[{"  # of a pattern


@dataclass(frozen=True)
class Entry:
    """One picture or text.

    Attributes:
        id: its name within the sources; where: path, SHARD#KEY, or FILE:LINE.
        key: of its content; item: what an encoder takes.
        label: of its class, as folder or shard say it; "" for none.
    """

    id: str
    where: str
    key: str
    item: Item
    caption: str = ""
    label: str = ""


@dataclass
class Found:
    """Entries in the order of the sources; bad: why others cannot be read, by where they lie."""

    entries: list[Entry] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)


def pictures(sources: Sequence[str], kind: str, options: Mapping[str, Any], kept: Path) -> Found:
    """Of folders (with all folders inside), single files, and shards of a kind, in this order.

    kept: where the content keys of files are remembered.
    Raises ValueError for sources that are not there or hold no picture, and shards that are damaged.
    """
    folders, files, shards = [], [], []
    for source in sources:
        path = Path(source).expanduser()
        if os.path.isdir(path):
            folders.append(path)
        elif path.suffix.lower() in ENDINGS and not any(sign in source for sign in MAGIC):
            if not path.is_file():
                raise ValueError(f"picture {source} is not there")
            files.append(path)
        else:
            shards.append(source)
    found = _of_files(folders, files, kept)
    if shards:
        of_shards = _Shards(shards, kind, options).found()
        found.entries += of_shards.entries
        found.bad |= of_shards.bad
    if not found.entries and not found.bad:
        raise ValueError(
            f"{', '.join(sources)}: no picture in it ({', '.join(FORMATS)}); name a folder that holds some, "
            "or shards as in 'FOLDER/*.tar'"
        )
    return found


def texts(sources: Sequence[str]) -> Found:
    """Each line of text files that is not blank. Raises ValueError for files without text."""
    found = Found()
    for source in sources:
        path = Path(source).expanduser()
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{source} is not a text file in UTF-8 ({error}); pictures need no --texts"
            ) from None
        except OSError as error:
            raise ValueError(f"texts {source} cannot be read: {error.strerror}") from None
        for number, line in enumerate(lines, 1):
            if text := line.strip():
                where = f"{path.absolute()}:{number}"
                found.entries.append(Entry(f"{path.name}:{number}", where, text_key(text), text, text))
    if not found.entries:
        raise ValueError(f"{', '.join(sources)}: no line of text in it")
    return found


# ---- files -------------------------------------------------------------------------------------


def _of_files(folders: Sequence[Path], files: Sequence[Path], kept: Path) -> Found:
    """Ids are paths from the folder that they have in common."""
    labels: dict[Path, str] = {}
    for folder in folders:
        for path in _inside(folder):
            inner = path.relative_to(folder).parts
            labels.setdefault(path.absolute(), inner[0] if len(inner) > 1 else "")
    for path in files:
        labels.setdefault(path.absolute(), "")
    if not labels:
        return Found()
    tops = [*folders, *(path.parent for path in files)]
    common = os.path.commonpath([os.path.abspath(top) for top in tops])
    unreadable: dict[Path, str] = {}
    keys = picture_keys(kept, labels, unreadable)
    found = Found(bad={str(path): why for path, why in unreadable.items()})
    for path, label in labels.items():
        if path in keys:
            name = os.path.relpath(path, common).replace(os.sep, "/")
            found.entries.append(Entry(name, str(path), keys[path], path, _caption_beside(path), label))
    return found


def _inside(folder: Path) -> Iterator[Path]:
    """Pictures by their endings, sorted; what is hidden is left alone."""
    for place, inner, names in os.walk(folder):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in ENDINGS:
                yield Path(place, name)


def _caption_beside(picture: Path) -> str:
    """Of the .txt or .json with the picture's name, as `flamingo data pack` takes it."""
    beside = {end: picture.with_suffix(f".{end}") for end in ("txt", "json")}
    return _caption({end: path.read_bytes() for end, path in beside.items() if path.is_file()})


def _caption(sample: Mapping[str, bytes]) -> str:
    """ "" where there is none, or none that is text: pictures are wanted, not pairs."""
    try:
        return _members.caption(sample)
    except BadSample:
        return ""


# ---- shards ------------------------------------------------------------------------------------


class _Shards:
    """Pictures of shards, which several threads may read."""

    def __init__(self, patterns: Sequence[str], kind: str, options: Mapping[str, Any]):
        self._read = reader(kind, options)
        self._pairs = kind == "pairs"
        self._shards = ShardSet(patterns, may_be_empty=True)
        self._lock = Lock()  # shards are opened and closed as they are read

    def sample(self, shard: int, number: int) -> dict[str, bytes]:
        with self._lock:
            return self._shards.read(shard, number)

    def document(self, sample: Mapping[str, bytes], key: str) -> Document:
        """Raises BadSample. Of pairs a caption that is missing does no harm."""
        if not self._pairs:
            return self._read(sample, key)
        name = _members.one_of(sample, _members.PICTURES, "image")
        return Document((_members.image(sample[name]), Text(_caption(sample))), key)

    def found(self) -> Found:
        found, counts = Found(), self._shards.counts.tolist()
        quiet = not sys.stderr.isatty()
        # Keys and words alone.
        with (
            decoding_for(None, lambda key: True),
            tqdm(total=sum(counts), desc="reading", disable=quiet) as bar,
        ):
            for shard, (place, name) in enumerate(zip(self._shards.places, self._shards.names, strict=True)):
                place = place if isinstance(place, str) else str(place.absolute())
                for number in range(counts[shard]):
                    key = self._shards.key(shard, number)
                    try:
                        found.entries += self._entries(shard, number, f"{name}#{key}", f"{place}#{key}")
                    except BadSample as error:
                        found.bad[f"{place}#{key}"] = str(error)
                    bar.update()
        return found

    def _entries(self, shard: int, number: int, name: str, where: str) -> list[Entry]:
        """One per picture; of several in a sample each has its number behind the key."""
        sample = self.sample(shard, number)
        document = self.document(sample, name)
        images = pictures_of(document)
        if not images:
            raise BadSample("no picture", "the sample holds text only")
        caption = " ".join(item.text.strip() for item in document.items if isinstance(item, Text)).strip()
        label = _label(sample) or caption
        ends = [f"#{at}" if len(images) > 1 else "" for at in range(len(images))]
        return [
            Entry(
                name + end, where + end, image.key, _InShard(self, shard, number, at, where), caption, label
            )
            for at, (image, end) in enumerate(zip(images, ends, strict=True))
        ]


@dataclass(frozen=True)
class _InShard:
    """A picture of a shard: the one at place `at` of its sample."""

    shards: _Shards
    shard: int
    number: int
    at: int
    where: str

    def decode(self) -> Any:
        """RGB (PIL). Raises BadSample."""
        sample = self.shards.sample(self.shard, self.number)
        return pictures_of(self.shards.document(sample, self.where))[self.at].image

    def __str__(self) -> str:
        return self.where


def pictures_of(document: Document) -> list[Image]:
    """In reading order; of clips each frame."""
    found: list[Image] = []
    for item in document.items:
        found += [item] if isinstance(item, Image) else item.frames if isinstance(item, Clip) else []
    return found


def _label(sample: Mapping[str, bytes]) -> str:
    """The class of a sample as WebDataset keeps it, in a member `cls`: a number or a name."""
    return sample["cls"].decode("utf-8", "replace").strip() if "cls" in sample else ""

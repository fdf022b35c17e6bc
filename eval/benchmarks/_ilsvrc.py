"""The files of ILSVRC 2012 in the ways they are published: image-net.org's, Kaggle's, torchvision's.

A class is named by its WordNet id, e.g. n02012849 (wnid below).
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

MAPPING = "LOC_synset_mapping.txt"
SOLUTION = "LOC_val_solution.csv"
DEVKIT = "ILSVRC2012_devkit_t12"
META = "meta.mat"
TRUTH = "ILSVRC2012_validation_ground_truth.txt"
NAMES = "classnames.txt"
PICTURES = ("ILSVRC/Data/CLS-LOC", ".")  # as Kaggle's archive unpacks, or the splits at the top
SUFFIXES = {".jpeg", ".jpg", ".png"}
# Both are "crane" in the official files; in the hub's copy the machine is "crane2".
MACHINE, MACHINE_ON_HUB, MACHINE_NAME = "n03126707", "crane2", "construction crane"


def found(folder: Path, *names: str) -> Path | None:
    """The first of the names that is there, at the top or in the devkit."""
    for name in names:
        for place in (folder, folder / DEVKIT / "data", folder / "devkit" / "data"):
            if (place / name).exists():
                return place / name
    return None


def official_names(folder: Path) -> dict[str, str]:
    """wnid -> synonyms, as "tench, Tinca tinca", by sorted wnid. Raises ValueError without the files."""
    path = found(folder, MAPPING, META)
    if path is None:
        raise ValueError(
            f"{folder} does not tell the names of the classes: put Kaggle's {MAPPING} or the development "
            f"kit's folder {DEVKIT} beside the pictures"
        )
    if path.name == META:
        return dict(sorted((wnid, words) for wnid, words in synsets(path).values()))
    names = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            wnid, _, words = line.strip().partition(" ")
            if not words:
                raise ValueError(f"{path}, line {number}: {line!r} is not a wnid and its names")
            names[wnid] = words
    return dict(sorted(names.items()))


def synsets(meta: Path) -> dict[int, tuple[str, str]]:
    """Number in the ground truth -> (wnid, synonyms), of the devkit's meta.mat; classes only."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise ValueError(f"{meta} needs scipy: pip install scipy, or put {MAPPING} in its place") from None
    try:
        rows = loadmat(meta, squeeze_me=True)["synsets"]
        entries = [(int(r["ILSVRC2012_ID"]), str(r["WNID"]), str(r["words"])) for r in rows]
        leaves = {
            number for number, row in zip([e[0] for e in entries], rows) if not int(row["num_children"])
        }
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"{meta} is not the development kit's ({error}): fetch it again") from None
    return {number: (wnid, words) for number, wnid, words in entries if number in leaves}


def readable(official: Mapping[str, str]) -> dict[str, str]:
    """Key (wnid, or the name in the hub's copy) -> one name, no two the same but for case.

    The first synonym; another where classes share that (the Cardigan is a Cardigan Welsh corgi).
    Raises ValueError where no name tells two classes apart.
    """
    synonyms = {key: [w.strip() for w in words.split(",")] for key, words in official.items()}
    synonyms |= {key: [MACHINE_NAME] for key in (MACHINE, MACHINE_ON_HUB) if key in synonyms}
    firsts = Counter(words[0].casefold() for words in synonyms.values())
    names = {}
    for key, words in synonyms.items():
        own = [w for w in words[1:] if w.casefold() not in firsts] if firsts[words[0].casefold()] > 1 else []
        names[key] = (own or words)[0]
    _distinct(names)
    return names


def class_names(folder: Path) -> dict[str, str]:
    """wnid -> name, by sorted wnid: of classnames.txt where that is there, else of the official files."""
    official = official_names(folder)
    path = folder / NAMES
    if not path.exists():
        return readable(official)
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(lines) != len(official):
        raise ValueError(f"{path} has {len(lines)} names for {len(official)} classes: one per line, by wnid")
    names = dict(zip(official, lines, strict=True))
    _distinct(names)
    return names


def _distinct(names: Mapping[str, str]) -> None:
    for name, many in Counter(name.casefold() for name in names.values()).items():
        if many > 1:
            which = [key for key, each in names.items() if each.casefold() == name]
            raise ValueError(
                f"classes {', '.join(which)} have the same name {name!r}: tell them apart in {NAMES}, one "
                "name per line, by sorted wnid"
            )


def pictures(folder: Path, split: str) -> list[tuple[Path, str]]:
    """(picture, wnid) of "train" or "val", in the order of their names. Raises ValueError."""
    roots = [folder / place / split for place in PICTURES]
    root = next((r for r in roots if r.is_dir()), None)
    if root is None:
        raise ValueError(f"{folder} has no folder {split} of pictures; unpack the archive of {split} there")
    classes = sorted(each for each in root.iterdir() if each.is_dir())
    if classes:
        return [(image, each.name) for each in classes for image in _images(each.iterdir())]
    flat = _images(root.iterdir())
    if not flat:
        raise ValueError(f"{root} holds no pictures; unpack the archive of {split} there")
    truth = _truth(folder, split)
    if unknown := [image for image in flat if image.stem not in truth]:
        raise ValueError(f"{len(unknown)} pictures of {root} are in no file of labels, as {unknown[0].name}")
    return [(image, truth[image.stem]) for image in flat]


def _images(paths: Iterable[Path]) -> list[Path]:
    return sorted(path for path in paths if path.suffix.lower() in SUFFIXES)


def _truth(folder: Path, split: str) -> dict[str, str]:
    """Name of a picture of the flat validation folder -> wnid."""
    path = found(folder, SOLUTION, TRUTH)
    if split != "val" or path is None:
        raise ValueError(
            f"{folder}/{split} has no folders by class, so {SOLUTION} (Kaggle) or the development kit's "
            f"{TRUTH} must tell them; neither is there"
        )
    if path.name == SOLUTION:
        with path.open(newline="", encoding="utf-8") as file:
            return {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}
    meta = found(folder, META)
    if meta is None:
        raise ValueError(f"{path} has the kit's own numbers of classes: put its {META} there too")
    known = synsets(meta)
    numbers: Sequence[Any] = path.read_text().split()
    try:
        return {f"ILSVRC2012_val_{n:08d}": known[int(k)][0] for n, k in enumerate(numbers, start=1)}
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: {error} is no number of a class in {meta}; fetch both again") from None

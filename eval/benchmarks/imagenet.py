"""ImageNet-1k (ILSVRC 2012; Russakovsky et al. 2015): which of 1,000 classes is on the picture?

The names of all classes are ranked by likelihood; top-1 accuracy. The 50,000 pictures of "val" are asked,
those of "train" give shots. In the folder: train/ and val/ with a folder per class (as torchvision's), or
val/ flat with a file of labels; or Kaggle's archive as it unpacks. Names of classes are the official
ones; a file classnames.txt, one name per line by sorted wnid, replaces them (OpenFlamingo has CLIP's).
"""

from __future__ import annotations

from pathlib import Path

from flamingo.eval import hub
from flamingo.eval.benchmarks import Example, File, _ilsvrc

TITLE = "ImageNet-1k"
DESCRIPTION = "ImageNet-1k, validation split: top-1 accuracy among the names of all classes"
LICENCE = "ImageNet's terms of access: non-commercial research and education"
SOURCE = "https://image-net.org/download-images.php"
KAGGLE = "https://www.kaggle.com/c/imagenet-object-localization-challenge/data"
MAPPING = File(_ilsvrc.MAPPING, f"{KAGGLE}; or the folder {_ilsvrc.DEVKIT} of {SOURCE}")
FILES: dict[str, tuple[File, ...]] = {
    "train": (File("train", SOURCE, images=True), MAPPING),
    "val": (File("val", SOURCE, images=True), MAPPING),
}
QUERIES, DEMONSTRATIONS = "val", "train"
METRICS = ("top1",)
MAX_NEW_TOKENS = 0
MEAN_LIKELIHOOD = True  # as OpenFlamingo's evaluation does
BLIND = None
# 10,000 of the training pictures are enough to draw shots from: the rest is not written to disk.
HUB = hub.Copy(
    "ILSVRC/imagenet-1k",
    {"train": "train", "val": "validation"},
    id=None,
    answers="label",
    at_most={"train": 10_000},
)


def CLASSES(folder: Path | None) -> tuple[str, ...]:
    """By sorted wnid. Raises ValueError where no official file names the classes."""
    return tuple(f" {name}" for name in _names(folder).values())


def examples(folder: Path | None, split: str) -> list[Example]:
    """One split. Raises ValueError where files are not there, or a class has no name."""
    names = _names(folder)
    if folder is not None and hub.asked(folder):
        rows = hub.examples(HUB, folder, split)
        return [Example(e.id, e.image, answers=tuple(names[a] for a in e.answers)) for e in rows]
    assert folder is not None
    found = _ilsvrc.pictures(folder, split)
    if unknown := {wnid for _, wnid in found} - names.keys():
        raise ValueError(f"{folder}/{split}: the official files have no class {min(unknown)!r}")
    return [Example(image.stem, image, answers=(names[wnid],)) for image, wnid in found]


def _names(folder: Path | None) -> dict[str, str]:
    """wnid, or the name in the hub's copy -> name in prompts."""
    if folder is None:
        raise ValueError(f"{TITLE} needs its data: --data FOLDER, with train and val from {SOURCE}")
    if hub.asked(folder):
        official = hub.class_names(HUB, folder, "val", "label")
        return _ilsvrc.readable({name: name for name in official})
    if not folder.is_dir():
        raise ValueError(
            f"{TITLE}: data={folder} is not a folder; it should hold train and val from {SOURCE}"
        )
    return _ilsvrc.class_names(folder)


def prompt(example: Example) -> str:
    """As in OpenFlamingo (Awadalla et al. 2023)."""
    return "Output:"


def _photo(example: Example) -> str:
    return "A photo of a"


PROMPTS = (_photo,)


def completion(example: Example) -> str:
    return f" {example.answers[0]}"


def tidy(text: str) -> str:
    return text.strip()

"""COCO captions (Lin et al. 2014) in the splits of Karpathy and Fei-Fei (2015).

5,000 pictures are asked, 82,783 give shots, each with about five captions; CIDEr-D. The splits "val",
"test" and "restval" are parts of the official val2014.
"""

from __future__ import annotations

from pathlib import Path

from flamingo.eval import hub
from flamingo.eval.benchmarks import Example, File, _captions
from flamingo.eval.benchmarks._reading import find

TITLE = "COCO captions"
DESCRIPTION = "COCO captions, Karpathy split: CIDEr-D of the generated caption"
LICENCE = "captions CC BY 4.0; pictures under the terms of Flickr, each with its own licence"
SOURCE = "https://cocodataset.org"
SPLITS = File("dataset_coco.json", _captions.SPLITS_ADDRESS)
TRAIN = File("train2014", "http://images.cocodataset.org/zips/train2014.zip", images=True)
VAL = File("val2014", "http://images.cocodataset.org/zips/val2014.zip", images=True)
FILES: dict[str, tuple[File, ...]] = {
    "train": (SPLITS, TRAIN),
    "restval": (SPLITS, VAL),
    "val": (SPLITS, VAL),
    "test": (SPLITS, VAL),
}
QUERIES, DEMONSTRATIONS = "test", "train"
METRICS = _captions.METRICS
MAX_NEW_TOKENS = _captions.MAX_NEW_TOKENS
BLIND = None
# One row per caption, in the layout of Karpathy's file; its "train" holds restval too.
HUB = hub.Copy(
    "bitmind/MS-COCO",
    {"train": "train", "restval": "train", "val": "validation", "test": "test"},
    id="cocoid",
    answers=lambda row: row["sentences"]["raw"],
    only={"train": ("split", "train"), "restval": ("split", "restval")},
)

prompt, completion, tidy = _captions.prompt, _captions.completion, _captions.tidy


def examples(folder: Path | None, split: str) -> list[Example]:
    """One split. Raises ValueError where its files are not there, or are others."""
    if folder is not None and hub.asked(folder):
        return hub.examples(HUB, folder, split)
    path = find(folder, SPLITS, TITLE)
    return _captions.karpathy(path, split, lambda e: path.parent / e["filepath"] / e["filename"])

"""Flickr30k (Young et al. 2014) in the splits of Karpathy and Fei-Fei (2015).

1,000 pictures are asked, 29,000 give shots, each with five captions; CIDEr-D.
"""

from __future__ import annotations

from pathlib import Path

from flamingo.eval import hub
from flamingo.eval.benchmarks import Example, File, _captions
from flamingo.eval.benchmarks._reading import find

TITLE = "Flickr30k"
DESCRIPTION = "Flickr30k captions, Karpathy split: CIDEr-D of the generated caption"
LICENCE = "non-commercial research and education; pictures under the terms of Flickr"
SOURCE = "https://shannon.cs.illinois.edu/DenotationGraph/"
SPLITS = File("dataset_flickr30k.json", _captions.SPLITS_ADDRESS)
IMAGES = File("flickr30k-images", f"{SOURCE} (asked for by a form)", images=True)
FILES: dict[str, tuple[File, ...]] = dict.fromkeys(("train", "val", "test"), (SPLITS, IMAGES))
QUERIES, DEMONSTRATIONS = "test", "train"
METRICS = _captions.METRICS
MAX_NEW_TOKENS = _captions.MAX_NEW_TOKENS
BLIND = None
# All pictures are in its one split, "test"; Karpathy's splits are a column. The branch is the hub's own
# conversion to parquet, as the repository itself is a loading script, which is not run.
HUB = hub.Copy(
    "nlphuji/flickr30k",
    dict.fromkeys(FILES, "test"),
    id=lambda row: Path(row["filename"]).stem,
    answers="caption",
    only={split: ("split", split) for split in FILES},
    revision="refs/convert/parquet",
)

prompt, completion, tidy = _captions.prompt, _captions.completion, _captions.tidy


def examples(folder: Path | None, split: str) -> list[Example]:
    """One split. Raises ValueError where its files are not there, or are others."""
    if folder is not None and hub.asked(folder):
        return hub.examples(HUB, folder, split)
    path = find(folder, SPLITS, TITLE)
    return _captions.karpathy(path, split, lambda e: path.parent / IMAGES.path / e["filename"])

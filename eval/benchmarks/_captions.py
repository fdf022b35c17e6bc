"""What captioning benchmarks share: the prompt, the splits of Karpathy and Fei-Fei (2015), tidying."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flamingo.eval.benchmarks import Example
from flamingo.eval.benchmarks._reading import malformed, read_json

SPLITS_ADDRESS = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
METRICS = ("cider", "bleu", "rouge_l")
MAX_NEW_TOKENS = 20  # of OpenFlamingo (Awadalla et al. 2023)


def karpathy(path: Path, split: str, picture: Callable[[dict[str, Any]], Path]) -> list[Example]:
    """The pictures of a split in the file's order, each with all its captions.

    picture: from an entry of the file. Ids: COCO's, where there are, else the name of the picture.
    Raises ValueError for a file in another format.
    """
    read = read_json(path)
    if not isinstance(read, dict) or "images" not in read:
        raise ValueError(f"{path} has no list of images: it is not the file of {SPLITS_ADDRESS}")
    found = []
    for number, entry in enumerate(read["images"]):
        try:
            if entry["split"] == split:
                name = str(entry["cocoid"]) if "cocoid" in entry else Path(entry["filename"]).stem
                captions = tuple(sentence["raw"] for sentence in entry["sentences"])
                found.append(Example(name, picture(entry), answers=captions))
        except (KeyError, TypeError) as error:
            raise malformed(path, number, error) from None
    return found


def prompt(example: Example) -> str:
    """As in OpenFlamingo: the caption follows without a blank."""
    return "Output:"


def completion(example: Example) -> str:
    """The first caption."""
    return example.answers[0].strip()


def tidy(text: str) -> str:
    """The caption alone: up to where the model begins another, without quotation marks."""
    return " ".join(text.split("Output", 1)[0].replace('"', "").split())

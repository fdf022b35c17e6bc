"""NoCaps (Agrawal et al. 2019): captions of objects that COCO's captions do not speak of.

4,500 validation pictures with ten captions each, told apart by how far their objects are from COCO's:
in-domain, near-domain, out-domain. The benchmark has no captions to learn from but COCO's, so shots are
from COCO's training split, whose files lie in the same folder.
"""

from __future__ import annotations

from pathlib import Path

from flamingo.eval import hub
from flamingo.eval.benchmarks import Example, File, _captions, coco
from flamingo.eval.benchmarks._reading import find, malformed, read_json

TITLE = "NoCaps"
DESCRIPTION = "NoCaps validation captions, by domain: CIDEr-D of the generated caption; shots from COCO"
LICENCE = "pictures CC BY 2.0 (Open Images V4); captions as nocaps.org says"
SOURCE = "https://nocaps.org/download"
CAPTIONS = File(
    "nocaps_val_4500_captions.json", "https://nocaps.s3.amazonaws.com/nocaps_val_4500_captions.json"
)
IMAGES = File("val", f"{SOURCE}; the annotations have each picture's address as coco_url", images=True)
FILES: dict[str, tuple[File, ...]] = {"val": (CAPTIONS, IMAGES), "train": coco.FILES["train"]}
QUERIES, DEMONSTRATIONS = "val", "train"
METRICS = _captions.METRICS
MAX_NEW_TOKENS = _captions.MAX_NEW_TOKENS
BLIND = None
# Without the domains; shots come from COCO's copy.
HUB = hub.Copy("lmms-lab/NoCaps", {"val": "validation"}, id="image_id", answers="annotations_captions")

prompt, completion, tidy = _captions.prompt, _captions.completion, _captions.tidy


def examples(folder: Path | None, split: str) -> list[Example]:
    """One split; of "val", the kind is the domain. Raises ValueError where files are not there."""
    if split == "train":
        return coco.examples(Path(hub.WORD) if hub.asked(folder) else folder, "train")
    if folder is not None and hub.asked(folder):
        return hub.examples(HUB, folder, split)
    path = find(folder, CAPTIONS, TITLE)
    read = read_json(path)
    if not isinstance(read, dict) or not read.get("images") or not read.get("annotations"):
        raise ValueError(f"{path} has no pictures or no captions: take {CAPTIONS.where}")
    captions: dict[int, list[str]] = {}
    for number, entry in enumerate(read["annotations"]):
        try:
            captions.setdefault(entry["image_id"], []).append(entry["caption"])
        except (KeyError, TypeError) as error:
            raise malformed(path, number, error) from None
    found = []
    for number, entry in enumerate(read["images"]):
        try:
            image, answers = path.parent / IMAGES.path / entry["file_name"], captions.get(entry["id"], [])
            found.append(
                Example(str(entry["id"]), image, answers=tuple(answers), kind=entry.get("domain", ""))
            )
        except (KeyError, TypeError) as error:
            raise malformed(path, number, error) from None
    return found

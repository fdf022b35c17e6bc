"""Tiny data folders in the official formats of captioning and classification, and hub copies of them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

WORDS = ("dog", "cat", "bus", "kite", "cake", "boat")
# wnid -> official names, with the names that two classes share.
CLASSES = {
    "n01440764": "tench, Tinca tinca",
    "n02012849": "crane",
    "n02113186": "Cardigan, Cardigan Welsh corgi",
    "n02963159": "cardigan",
    "n03126707": "crane",
    "n03710637": "maillot",
    "n03710721": "maillot, tank suit",
}


def write_picture(path: Path, number: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (number * 40 % 256, number, 0)).save(path)
    return path


def picture_bytes(number: int) -> bytes:
    held = io.BytesIO()
    Image.new("RGB", (8, 8), (number * 40 % 256, number, 1)).save(held, "PNG")
    return held.getvalue()


def captions(number: int, count: int = 5) -> list[str]:
    return [f"A {WORDS[number % len(WORDS)]} number {number}, seen {way} times. " for way in range(count)]


def karpathy_entries(splits: Sequence[str], **more: Any) -> list[dict[str, Any]]:
    """As in the file; more: fields of an entry by a function of its number and split."""
    entries = []
    for number, split in enumerate(splits):
        sentences = [
            {"raw": text, "tokens": text.split(), "imgid": number, "sentid": 5 * number + way}
            for way, text in enumerate(captions(number))
        ]
        entry = {"imgid": number, "split": split, "sentences": sentences, "sentids": []}
        entries.append(entry | {name: make(number, split) for name, make in more.items()})
    return entries


def write_coco(folder: Path) -> Path:
    """Four of train, one of restval, two of val, three of test."""
    splits = ["train"] * 4 + ["restval", "val", "val"] + ["test"] * 3
    entries = karpathy_entries(
        splits,
        filepath=lambda n, split: "train2014" if split == "train" else "val2014",
        filename=lambda n, split: f"COCO_{'train' if split == 'train' else 'val'}2014_{n + 100:012d}.jpg",
        cocoid=lambda n, split: n + 100,
    )
    for number, entry in enumerate(entries):
        write_picture(folder / entry["filepath"] / entry["filename"], number)
    (folder / "dataset_coco.json").write_text(json.dumps({"images": entries, "dataset": "coco"}))
    return folder


def write_flickr30k(folder: Path) -> Path:
    splits = ["test", "train", "train", "val", "train", "train", "test"]
    entries = karpathy_entries(splits, filename=lambda n, split: f"{1000092795 + n}.jpg")
    for number, entry in enumerate(entries):
        write_picture(folder / "flickr30k-images" / entry["filename"], number)
    (folder / "dataset_flickr30k.json").write_text(json.dumps({"images": entries, "dataset": "flickr30k"}))
    return folder


def write_nocaps(folder: Path) -> Path:
    """Three pictures of ten captions, one of each domain; COCO's files beside them."""
    write_coco(folder)
    images, annotations = [], []
    for number, domain in enumerate(("in-domain", "near-domain", "out-domain")):
        name = f"{number:016x}"
        write_picture(folder / "val" / f"{name}.jpg", number + 20)
        images.append({"id": number, "open_images_id": name, "file_name": f"{name}.jpg", "domain": domain})
        annotations += [
            {"image_id": number, "id": 10 * number + way, "caption": text}
            for way, text in enumerate(captions(number, 10))
        ]
    held = {"licenses": [], "info": {}, "images": images, "annotations": annotations}
    (folder / "nocaps_val_4500_captions.json").write_text(json.dumps(held))
    return folder


def write_hateful_memes(folder: Path) -> Path:
    number = 8000
    for split, count in (
        ("train", 6),
        ("dev_seen", 4),
        ("dev_unseen", 2),
        ("test_seen", 4),
        ("test_unseen", 2),
    ):
        rows = []
        for _ in range(count):
            number += 1
            write_picture(folder / "img" / f"{number:05d}.png", number % 90)
            rows.append(
                {"id": number, "img": f"img/{number:05d}.png", "label": number % 2, "text": f"meme {number}"}
            )
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_mapping(folder: Path, classes: Mapping[str, str] = CLASSES) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "LOC_synset_mapping.txt").write_text("".join(f"{w} {n}\n" for w, n in classes.items()))


def write_train(folder: Path) -> None:
    for number, wnid in enumerate(CLASSES):
        for each in range(2):
            write_picture(folder / "train" / wnid / f"{wnid}_{each}.JPEG", number)


def write_imagenet(folder: Path) -> Path:
    """A folder per class in both splits, with Kaggle's names of classes."""
    write_mapping(folder)
    write_train(folder)
    for number, wnid in enumerate(CLASSES):
        write_picture(folder / "val" / wnid / f"ILSVRC2012_val_{number + 1:08d}.JPEG", number)
    return folder


def write_imagenet_kaggle(folder: Path) -> Path:
    """As Kaggle's archive unpacks: validation pictures in one folder, their classes in a table."""
    pictures = folder / "ILSVRC" / "Data" / "CLS-LOC"
    write_mapping(folder)
    write_train(pictures)
    with (folder / "LOC_val_solution.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["ImageId", "PredictionString"])
        for number, wnid in reversed(list(enumerate(CLASSES, start=1))):
            name = f"ILSVRC2012_val_{number:08d}"
            write_picture(pictures / "val" / f"{name}.JPEG", number)
            table.writerow([name, f"{wnid} 1 2 3 4 {wnid} 5 6 7 8 "])
    return folder


def write_imagenet_devkit(folder: Path) -> Path:
    """As image-net.org's archives unpack, with the development kit; its numbers are not by wnid."""
    import numpy as np
    from scipy.io import savemat

    write_train(folder)
    kit = folder / "ILSVRC2012_devkit_t12" / "data"
    kit.mkdir(parents=True)
    order = list(reversed(CLASSES))
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    rows = [(number, wnid, CLASSES[wnid], "-", 0) for number, wnid in enumerate(order, start=1)]
    rows.append((len(rows) + 1, "n00001740", "entity", "-", 2))
    savemat(kit / "meta.mat", {"synsets": np.array(rows, dtype=fields)})
    truth = [order.index(wnid) + 1 for wnid in CLASSES]
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{n}\n" for n in truth))
    for number in range(1, len(CLASSES) + 1):
        write_picture(folder / "val" / f"ILSVRC2012_val_{number:08d}.JPEG", number)
    return folder


WRITERS = {
    "coco": write_coco,
    "flickr30k": write_flickr30k,
    "nocaps": write_nocaps,
    "hateful_memes": write_hateful_memes,
    "imagenet": write_imagenet,
}


# -- copies on the hub ---------------------------------------------------------------------


def write_copy(folder: Path, splits: Mapping[str, list[dict[str, Any]]], labels: Sequence[str] = ()) -> Path:
    """Parquet files as a repository of data has them; "image" holds bytes, "label" is a class label."""
    from datasets import ClassLabel, Dataset
    from datasets import Image as ImageColumn

    (folder / "data").mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        table = Dataset.from_list(rows).cast_column("image", ImageColumn())
        if labels:
            table = table.cast_column("label", ClassLabel(names=list(labels)))
        table.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def image_cell(number: int, name: str = "") -> dict[str, Any]:
    return {"bytes": picture_bytes(number), "path": name or None}


def flickr30k_rows() -> list[dict[str, Any]]:
    return [
        {
            "image": image_cell(number),
            "caption": captions(number),
            "sentids": [str(5 * number + way) for way in range(5)],
            "split": split,
            "img_id": str(number),
            "filename": f"{1000092795 + number}.jpg",
        }
        for number, split in enumerate(["test", "train", "train", "val", "train"])
    ]


def coco_rows(numbers: Sequence[int], split: str) -> list[dict[str, Any]]:
    """One row per caption."""
    return [
        {
            "image": image_cell(number),
            "filepath": "val2014",
            "sentids": [1],
            "filename": f"COCO_val2014_{number:012d}.jpg",
            "imgid": number,
            "split": split,
            "sentences": {"tokens": text.split(), "raw": text, "imgid": number, "sentid": way},
            "cocoid": number,
        }
        for number in numbers
        for way, text in enumerate(captions(number))
    ]


def nocaps_rows() -> list[dict[str, Any]]:
    return [
        {
            "image": image_cell(number),
            "image_coco_url": f"https://s3.amazonaws.com/nocaps/val/{number:016x}.jpg",
            "image_file_name": f"{number:016x}.jpg",
            "image_id": number,
            "image_open_images_id": f"{number:016x}",
            "annotations_ids": list(range(10)),
            "annotations_captions": captions(number, 10),
        }
        for number in range(3)
    ]

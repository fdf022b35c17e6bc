"""COCO, Flickr30k and NoCaps, read from their official files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flamingo.eval.benchmarks import Example, coco, flickr30k, load, nocaps
from flamingo.eval.config import EvalConfig
from flamingo.eval.few_shot import build, choose_shots
from flamingo.eval.task import Task
from tests.eval.fixtures_captions import captions, write_coco, write_flickr30k, write_nocaps


def change(path: Path, make) -> None:
    held = json.loads(path.read_text())
    make(held)
    path.write_text(json.dumps(held))


def test_coco_splits_have_the_pictures_of_their_folders(tmp_path):
    write_coco(tmp_path)
    sizes = {split: len(coco.examples(tmp_path, split)) for split in coco.FILES}
    assert sizes == {"train": 4, "restval": 1, "val": 2, "test": 3}
    (first, *_) = coco.examples(tmp_path, "test")
    assert first == Example(
        "107", tmp_path / "val2014" / "COCO_val2014_000000000107.jpg", answers=tuple(captions(7))
    )
    assert {e.image.parent.name for e in coco.examples(tmp_path, "train")} == {"train2014"}
    assert all(e.image.exists() for split in coco.FILES for e in coco.examples(tmp_path, split))


def test_flickr30k_ids_are_names_of_pictures(tmp_path):
    write_flickr30k(tmp_path)
    assert [e.id for e in flickr30k.examples(tmp_path, "test")] == ["1000092795", "1000092801"]
    assert len(flickr30k.examples(tmp_path, "train")) == 4
    assert all(e.image.exists() and len(e.answers) == 5 for e in flickr30k.examples(tmp_path, "val"))


def test_nocaps_tells_domains_apart_and_takes_shots_from_coco(tmp_path):
    write_nocaps(tmp_path)
    queries = nocaps.examples(tmp_path, "val")
    assert [e.kind for e in queries] == ["in-domain", "near-domain", "out-domain"]
    assert [len(e.answers) for e in queries] == [10, 10, 10]
    assert nocaps.examples(tmp_path, "train") == coco.examples(tmp_path, "train")


@pytest.mark.parametrize("name", ["coco", "flickr30k", "nocaps"])
def test_prompts_are_those_of_open_flamingo(tmp_path, name):
    {"coco": write_coco, "flickr30k": write_flickr30k, "nocaps": write_nocaps}[name](tmp_path)
    config = EvalConfig(benchmark=name, data=tmp_path, shots=(2,), control_limit=0)
    task, (setting,) = Task.of(config), config.settings()
    query = task.queries[0]
    prompt = build(load(name), query, choose_shots(task.pool, query, setting), setting)
    assert prompt.text == "<image>Output:"
    said = [f"<image>Output:{shot.answers[0].strip()}<|endofchunk|>" for shot in prompt.shots]
    assert prompt.prefix == "".join(said) and len(said) == 2


@pytest.mark.parametrize(
    ("generated", "caption"),
    [
        (" A dog on a mat. ", "A dog on a mat."),
        ("A dogOutput:A cat", "A dog"),
        ('a "stop" sign\nby a road', "a stop sign by a road"),
        ("Output:", ""),
    ],
)
def test_a_caption_ends_where_another_begins(generated, caption):
    assert coco.tidy(generated) == caption


def test_tidying_agrees_with_open_flamingo():
    """Its module is imported from its file: the package wants libraries that evaluation does not."""
    package = pytest.importorskip("open_flamingo")
    source = (Path(package.__file__ or "").parent / "eval" / "coco_metric.py").read_text()
    found: dict = {}
    exec(source[source.index("def postprocess_captioning_generation") :], found)
    for text in ("a dog", "a dog Output:a cat", 'the "big" dog', "Outputs", "a, b. C"):
        theirs = found["postprocess_captioning_generation"](text).replace('"', "")
        assert coco.tidy(text) == theirs.strip()


def test_missing_files_are_named_with_their_address(tmp_path):
    with pytest.raises(ValueError, match=r"dataset_coco\.json is not there.*caption_datasets\.zip"):
        coco.examples(tmp_path, "test")
    with pytest.raises(ValueError, match="needs its data: --data FOLDER"):
        flickr30k.examples(None, "test")
    with pytest.raises(ValueError, match="nocaps_val_4500_captions.json is not there"):
        nocaps.examples(tmp_path, "val")
    with pytest.raises(ValueError, match="dataset_coco.json is not there"):
        nocaps.examples(tmp_path, "train")


def test_missing_pictures_stop_an_evaluation_before_it_begins(tmp_path):
    write_coco(tmp_path)
    (tmp_path / "val2014" / "COCO_val2014_000000000108.jpg").unlink()
    with pytest.raises(ValueError, match="COCO_val2014_000000000108.jpg"):
        Task.of(EvalConfig(benchmark="coco", data=tmp_path, shots=(0,), zero_shot="none"))


def test_files_of_another_format_are_refused(tmp_path):
    write_nocaps(tmp_path)
    path = tmp_path / "dataset_coco.json"
    change(path, lambda held: held["images"][7].pop("sentences"))
    with pytest.raises(ValueError, match=r"dataset_coco\.json, entry 7, .*sentences"):
        coco.examples(tmp_path, "test")
    path.write_text('{"annotations": []}')
    with pytest.raises(ValueError, match="no list of images"):
        coco.examples(tmp_path, "test")
    path.write_text('{"images": [')
    with pytest.raises(ValueError, match="is no JSON"):
        coco.examples(tmp_path, "test")
    captions_file = tmp_path / "nocaps_val_4500_captions.json"
    change(captions_file, lambda held: held["annotations"][3].pop("caption"))
    with pytest.raises(ValueError, match="entry 3, .*caption"):
        nocaps.examples(tmp_path, "val")
    change(captions_file, lambda held: held.pop("annotations"))  # the file of image addresses alone
    with pytest.raises(ValueError, match="no pictures or no captions"):
        nocaps.examples(tmp_path, "val")

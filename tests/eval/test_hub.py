"""Copies on the hub: local parquet folders in their layouts give the benchmark's examples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flamingo.eval import hub
from flamingo.eval.benchmarks import coco, flickr30k, hateful_memes, imagenet, nocaps
from flamingo.eval.config import EvalConfig
from flamingo.eval.task import Task
from tests.eval.fixtures_captions import (
    captions,
    coco_rows,
    flickr30k_rows,
    image_cell,
    nocaps_rows,
    picture_bytes,
    write_copy,
)

pytest.importorskip("datasets")
NAMES = ("tench, Tinca tinca", "crane", "crane2", "maillot", "maillot, tank suit")
SIMPLE = hub.Copy("owner/simple", {"test": "test"}, id="key", answers="answer")


@pytest.fixture(autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing of a test stays in the user's caches, and nothing is asked of the network."""
    from datasets import config

    place = tmp_path_factory.mktemp("caches")
    monkeypatch.setenv("FLAMINGO_CACHE", str(place / "flamingo"))
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", place / "datasets")
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    return place


def data(folder: Path) -> Path:
    return Path(f"hub:{folder}")


def simple(folder: Path, answers=("red", "blue"), numbers=(0, 1)) -> Path:
    rows = [{"image": image_cell(n), "key": n, "answer": a} for n, a in zip(numbers, answers, strict=True)]
    write_copy(folder, {"test": rows})
    return data(folder)


def test_pictures_and_texts_of_a_copy_are_the_examples(tmp_path):
    write_copy(tmp_path, {"test": flickr30k_rows()})
    queries = flickr30k.examples(data(tmp_path), "test")
    assert [e.id for e in queries] == ["1000092795"]
    assert queries[0].answers == tuple(captions(0)) and queries[0].image.suffix == ".png"
    assert queries[0].image.read_bytes() == picture_bytes(0)
    shots = flickr30k.examples(data(tmp_path), "train")
    assert [e.id for e in shots] == ["1000092796", "1000092797", "1000092799"]
    assert shots[1].image.read_bytes() == picture_bytes(2)


def test_the_hub_s_own_conversion_is_read_as_it_lies(tmp_path):
    """A branch refs/convert/parquet has CONFIG/SPLIT/0000.parquet."""
    write_copy(tmp_path, {"test": flickr30k_rows()})
    (file,) = tmp_path.rglob("*.parquet")
    (tmp_path / "TEST" / "test").mkdir(parents=True)
    file.rename(tmp_path / "TEST" / "test" / "0000.parquet")
    assert len(flickr30k.examples(data(tmp_path), "train")) == 3


def test_rows_of_one_picture_are_one_example(tmp_path):
    train = coco_rows([1, 2], "train") + coco_rows([3], "restval")
    write_copy(tmp_path, {"train": train, "test": coco_rows([4, 5], "test")})
    assert [(e.id, e.answers) for e in coco.examples(data(tmp_path), "test")] == [
        (str(n), tuple(captions(n))) for n in (4, 5)
    ]
    assert [e.id for e in coco.examples(data(tmp_path), "train")] == ["1", "2"]
    assert [e.id for e in coco.examples(data(tmp_path), "restval")] == ["3"]


def test_an_evaluation_runs_on_a_copy(tmp_path):
    write_copy(tmp_path, {"test": flickr30k_rows()})
    task = Task.of(EvalConfig(benchmark="flickr30k", data=data(tmp_path), shots=(2,), control_limit=0))
    assert len(task.queries) == 1 and len(task.pool) == 3


def test_classes_have_their_official_names_in_order(tmp_path):
    def rows(split, count):
        return [{"image": image_cell(n), "label": n % len(NAMES)} for n in range(count)]

    write_copy(tmp_path, {"train": rows("train", 9), "validation": rows("validation", 5)}, NAMES)
    readable = ("tench", "crane", "construction crane", "maillot", "tank suit")
    assert imagenet.CLASSES(data(tmp_path)) == tuple(f" {name}" for name in readable)
    assert [e.answers[0] for e in imagenet.examples(data(tmp_path), "val")] == list(readable)
    assert [e.id for e in imagenet.examples(data(tmp_path), "train")] == [str(n) for n in range(9)]


def test_nocaps_is_read_and_its_shots_come_from_coco(tmp_path, monkeypatch):
    write_copy(tmp_path / "nocaps", {"validation": nocaps_rows()})
    queries = nocaps.examples(data(tmp_path / "nocaps"), "val")
    assert [e.id for e in queries] == ["0", "1", "2"] and len(queries[0].answers) == 10
    write_copy(tmp_path / "coco", {"train": coco_rows([1, 2], "train")})
    monkeypatch.setattr(coco, "HUB", hub.chosen(coco.HUB, data(tmp_path / "coco")))
    assert [e.id for e in nocaps.examples(data(tmp_path / "nocaps"), "train")] == ["1", "2"]


def test_a_copy_is_written_once(tmp_path, caches):
    where = simple(tmp_path)
    first = hub.examples(SIMPLE, where, "test")
    place = hub.cache_folder(str(tmp_path))
    assert caches in place.parents and len(list(place.glob("*.jsonl"))) == 1
    written = {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
    assert len(written) == 3 and not list(place.rglob("*.part"))
    assert hub.examples(SIMPLE, where, "test") == first
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()} == written


def test_a_lost_picture_is_written_again(tmp_path):
    where = simple(tmp_path)
    first = hub.examples(SIMPLE, where, "test")
    first[1].image.unlink()
    assert hub.examples(SIMPLE, where, "test") == first and first[1].image.exists()


def test_a_changed_copy_is_read_anew(tmp_path):
    simple(tmp_path)
    assert [e.answers for e in hub.examples(SIMPLE, data(tmp_path), "test")] == [("red",), ("blue",)]
    simple(tmp_path, answers=("red", "green", "pink"), numbers=(0, 1, 2))
    assert [e.answers[0] for e in hub.examples(SIMPLE, data(tmp_path), "test")] == ["red", "green", "pink"]


def test_a_copy_that_is_read_in_another_way_is_read_anew(tmp_path):
    where = simple(tmp_path)
    ways = [lambda row: row["answer"], lambda row: [a + "!" for a in [row["answer"]]], "answer"]
    found = [
        [e.answers[0] for e in hub.examples(hub.Copy("a/b", {"test": "test"}, "key", way), where, "test")]
        for way in (*ways, *ways)
    ]
    assert found == [["red", "blue"], ["red!", "blue!"], ["red", "blue"]] * 2
    assert len(list(hub.cache_folder(str(tmp_path)).glob("*.jsonl"))) == 3


def test_the_same_picture_twice_is_one_file(tmp_path):
    rows = [{"image": image_cell(7), "key": n, "answer": "a"} for n in range(3)]
    write_copy(tmp_path, {"test": rows})
    assert len({e.image for e in hub.examples(SIMPLE, data(tmp_path), "test")}) == 1


def test_a_sample_of_a_large_split_is_fixed_and_the_rest_is_not_written(tmp_path):
    simple(tmp_path, answers=["a"] * 20, numbers=range(20))
    few = hub.Copy("owner/simple", {"test": "test"}, id="key", answers="answer", at_most={"test": 6})
    found = hub.examples(few, data(tmp_path), "test")
    assert len(found) == 6 and [int(e.id) for e in found] == sorted(int(e.id) for e in found)
    assert len(list((hub.cache_folder(str(tmp_path)) / "images").iterdir())) == 6
    for path in hub.cache_folder(str(tmp_path)).glob("*.jsonl"):
        path.unlink()
    assert hub.examples(few, data(tmp_path), "test") == found


def test_columns_may_be_functions_and_texts_of_any_language(tmp_path):
    rows = [{"image": image_cell(1), "key": 5, "answer": [{"a": "né\u2028e"}, {"a": "b"}], "ask": "what?"}]
    write_copy(tmp_path, {"test": rows})
    copy = hub.Copy(
        "owner/name",
        {"test": "test"},
        id=lambda row: f"q{row['key']}",
        answers=lambda row: [each["a"] for each in row["answer"]],
        question="ask",
        kind=lambda row: "odd",
        context="ask",
    )
    for _ in range(2):  # as read, and as kept
        (found,) = hub.examples(copy, data(tmp_path), "test")
        assert (found.id, found.answers) == ("q5", ("né\u2028e", "b"))
        assert (found.question, found.kind, found.context) == ("what?", "odd", "what?")


def test_data_names_the_benchmark_s_copy_or_another():
    assert hub.asked(Path("hub")) and hub.asked(Path("hub:a/b")) and not hub.asked(None)
    assert not hub.asked(Path("hubs")) and not hub.asked(Path("/data/hub"))
    assert hub.chosen(flickr30k.HUB, Path("hub")) == flickr30k.HUB
    other = hub.chosen(flickr30k.HUB, Path("hub:me/mine"))
    assert (other.repo, other.revision) == ("me/mine", None)


def test_what_a_copy_lacks_is_named(tmp_path):
    where = simple(tmp_path)
    with pytest.raises(ValueError, match="has no split 'dev': choose one of test"):
        hub.examples(SIMPLE, where, "dev")
    renamed = hub.Copy("owner/simple", {"test": "validation"}, id="key", answers="answer")
    with pytest.raises(ValueError, match="split 'validation', cannot be read"):
        hub.examples(renamed, where, "test")
    with pytest.raises(ValueError, match="has no column 'caption', only image, key, answer"):
        hub.examples(hub.Copy("a/b", {"test": "test"}, id="key", answers="caption"), where, "test")
    nested = hub.Copy("a/b", {"test": "test"}, id="key", answers=lambda row: row["answer"]["raw"])
    with pytest.raises(ValueError, match="not in the expected layout"):
        hub.examples(nested, where, "test")
    with pytest.raises(ValueError, match="'answer' has no class labels"):
        hub.class_names(SIMPLE, where, "test", "answer")


def test_pictures_that_are_none_are_named(tmp_path):
    cell = {"bytes": b"no picture", "path": None}
    write_copy(tmp_path, {"test": [{"image": cell, "key": 0, "answer": "a"}]})
    with pytest.raises(ValueError, match="test, row 0: its picture cannot be read"):
        hub.examples(SIMPLE, data(tmp_path), "test")


def test_a_copy_that_cannot_be_fetched_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"data=hub:owner/simple, split 'test', cannot be read.*HF_TOKEN"):
        hub.examples(SIMPLE, Path("hub"), "test")


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    where = simple(tmp_path / "copy")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLAMINGO_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="set FLAMINGO_CACHE to a folder"):
        hub.examples(SIMPLE, where, "test")


def test_a_benchmark_without_a_copy_says_so():
    with pytest.raises(ValueError, match="data=hub: Hateful Memes has no copy on the hub"):
        hateful_memes.examples(Path("hub"), "train")


def test_the_word_survives_a_config_in_json():
    config = EvalConfig(benchmark="coco", data=Path("hub:me/mine"))
    again = EvalConfig(**json.loads(config.model_dump_json()))
    assert again.data is not None and str(again.data) == "hub:me/mine"

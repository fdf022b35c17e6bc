"""`flamingo eval describe`: what there is, what one benchmark needs, what a folder lacks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flamingo.cli import app
from flamingo.eval import benchmarks
from flamingo.eval.benchmarks._describe import describe
from tests.eval.fixtures_captions import WRITERS, flickr30k_rows, write_coco, write_copy, write_flickr30k


def test_without_a_name_all_benchmarks_are_listed():
    text, complete = describe(None)
    assert complete
    rows = {line.split()[0]: line for line in text.splitlines()[1:] if line.strip()}
    for name in benchmarks.names():
        each = benchmarks.load(name)
        assert each.TITLE in rows[name] and each.METRICS[0] in rows[name]
        assert all(split in rows[name] for split in each.FILES)
    assert "ranks classes" in rows["imagenet"] and "test*" in rows["coco"] and "train+" in rows["coco"]


@pytest.mark.parametrize("name", benchmarks.names())
def test_a_benchmark_s_files_licence_and_prompt_are_said(name):
    each = benchmarks.load(name)
    text, complete = describe(name)
    assert complete
    for said in (each.TITLE, each.DESCRIPTION, each.LICENCE, each.SOURCE, each.METRICS[0]):
        assert said in text
    for file in (file for files in each.FILES.values() for file in files):
        assert file.path in text and file.where in text
    assert "<image>" in text and "<|endofchunk|>" in text


def test_the_template_shows_where_the_fields_go():
    text, _ = describe("hateful_memes")
    assert (
        "<image>is an image with: '{text}' written on it. Is it hateful? Answer: {answer}<|endofchunk|>"
        in text
    )
    assert (
        "no copy known" in text and "https://huggingface.co/datasets/lmms-lab/NoCaps" in describe("nocaps")[0]
    )


@pytest.mark.parametrize("name", list(WRITERS))
def test_a_whole_folder_is_complete(tmp_path, name):
    text, complete = describe(name, WRITERS[name](tmp_path))
    assert complete and text.endswith("\ncomplete") and "missing" not in text
    assert "not there" not in text and "an example: <image>" in text


def test_examples_are_counted_and_missing_pictures_named(tmp_path):
    write_coco(tmp_path)
    for number in (107, 109):
        (tmp_path / "val2014" / f"COCO_val2014_{number:012d}.jpg").unlink()
    text, complete = describe("coco", tmp_path)
    assert not complete and text.endswith("not complete: test and train must be")
    (test,) = (line for line in text.splitlines() if line.strip().startswith("test "))
    assert "3 examples, 3 pictures, 2 of them missing" in test
    assert "COCO_val2014_000000000107.jpg, " in test and "000000000109.jpg" in test
    assert "4 examples, 4 pictures" in text


def test_only_the_first_missing_pictures_are_named(tmp_path):
    write_flickr30k(tmp_path)
    held = json.loads((tmp_path / "dataset_flickr30k.json").read_text())
    extra = [held["images"][0] | {"filename": f"lost{n}.jpg"} for n in range(9)]
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"images": held["images"] + extra}))
    text, _ = describe("flickr30k", tmp_path)
    assert "9 of them missing" in text and "lost4.jpg ..." in text and "lost5.jpg" not in text


def test_a_missing_split_that_nothing_needs_does_not_count(tmp_path):
    WRITERS["hateful_memes"](tmp_path)
    (tmp_path / "test_unseen.jsonl").unlink()
    text, complete = describe("hateful_memes", tmp_path)
    assert complete and "test_unseen.jsonl  not there" in " ".join(text.split(" "))
    (tmp_path / "train.jsonl").unlink()
    text, complete = describe("hateful_memes", tmp_path)
    assert not complete and "train.jsonl is not there" in text


def test_ids_that_come_twice_are_told(tmp_path):
    write_flickr30k(tmp_path)
    held = json.loads((tmp_path / "dataset_flickr30k.json").read_text())
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"images": held["images"] * 2}))
    text, complete = describe("flickr30k", tmp_path)
    assert not complete and "2 ids come more than once, the first is '1000092795'" in text


def test_a_copy_on_the_hub_is_read_too(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("FLAMINGO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    write_copy(tmp_path / "copy", {"test": flickr30k_rows()})
    text, complete = describe("flickr30k", Path(f"hub:{tmp_path / 'copy'}"))
    assert complete and "3 examples, 3 pictures" in text and "not there" not in text


def test_wrong_names_and_folders_are_errors(tmp_path):
    with pytest.raises(ValueError, match="benchmark 'koko': choose one of coco"):
        describe("koko")
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        describe("coco", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="say of which benchmark"):
        describe(None, tmp_path)


def test_the_command_fails_where_a_folder_is_not_complete(tmp_path):
    run = CliRunner().invoke
    assert run(app, ["eval", "describe"]).exit_code == 0
    whole = run(app, ["eval", "describe", "coco", "--data", str(write_coco(tmp_path / "a"))])
    assert whole.exit_code == 0 and "complete" in whole.output
    (tmp_path / "b").mkdir()
    assert run(app, ["eval", "describe", "coco", "--data", str(tmp_path / "b")]).exit_code == 1
    assert run(app, ["eval", "describe", "koko"]).exit_code != 0

"""Every file of eval/benchmarks and eval/metrics keeps the contract of its folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from flamingo.eval import benchmarks, hub, metrics
from flamingo.eval.benchmarks import CALLED, NEEDED, Example, File, Prediction

EXAMPLE = Example("1", Path("a.jpg"), "what is it?", ("a red kite",) * 10, "kind", "some words")
WANTED = {"coco", "flickr30k", "nocaps", "vqav2", "okvqa", "textvqa", "vizwiz", "gqa"}
WANTED |= {"hateful_memes", "imagenet", "easy_vqa"}
JAVA = {"meteor", "spice"}  # tested where Java is
LOOKING = {"clip_score", "ref_clip_score"}  # at the pictures, with an encoder: tests/clip/test_score.py

every = pytest.mark.parametrize("name", benchmarks.names())


def test_all_benchmarks_are_there_and_each_file_is_one():
    assert set(benchmarks.names()) >= WANTED
    folder = Path(benchmarks.__file__ or "").parent
    files = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")}
    assert files == set(benchmarks.names())


@every
def test_it_has_every_name_of_the_contract(name):
    each = benchmarks.load(name)
    assert not [wanted for wanted in f"{NEEDED} {CALLED}".split() if not hasattr(each, wanted)]
    for text in (each.TITLE, each.DESCRIPTION, each.LICENCE, each.SOURCE):
        assert isinstance(text, str) and text.strip() == text and text
    assert all(callable(getattr(each, called)) for called in CALLED.split())
    assert each.BLIND is None or 0 <= each.BLIND <= 1
    assert isinstance(each.MAX_NEW_TOKENS, int) and each.MAX_NEW_TOKENS >= 0


def test_titles_are_told_apart():
    titles = [benchmarks.load(name).TITLE for name in benchmarks.names()]
    assert len(set(titles)) == len(titles)


@every
def test_its_splits_have_files_with_an_address(name):
    each = benchmarks.load(name)
    assert {each.QUERIES, each.DEMONSTRATIONS} <= set(each.FILES)
    for split, files in each.FILES.items():
        assert files or getattr(each, "BUNDLED", False), f"{split} needs no file"
        for file in files:
            assert isinstance(file, File) and file.path and file.where
            assert not Path(file.path).is_absolute() and ".." not in Path(file.path).parts
            assert "://" in file.where


@every
def test_its_metrics_load_and_show_a_value(name):
    for metric in benchmarks.load(name).METRICS:
        module = metrics.load(metric)
        assert module.TITLE and module.SCALE > 0 and callable(module.value)
        assert callable(module.per_sample)


@every
def test_prompt_completion_and_tidied_text_are_texts(name):
    each = benchmarks.load(name)
    for ask in (each.prompt, *getattr(each, "PROMPTS", ())):
        assert isinstance(ask(EXAMPLE), str) and "<image>" not in ask(EXAMPLE)
        assert EXAMPLE.answers[0] not in ask(EXAMPLE)
    assert EXAMPLE.answers[0] in each.completion(EXAMPLE)
    for text in ("", " A red kite.", each.completion(EXAMPLE), "\n\n"):
        assert isinstance(each.tidy(text), str)
        assert each.tidy(each.tidy(text)) == each.tidy(text)


@every
def test_ranked_classes_continue_the_prompt(name):
    each = benchmarks.load(name)
    classes = getattr(each, "CLASSES", None)
    if each.MAX_NEW_TOKENS:
        assert classes is None
        return
    assert callable(classes)
    if name != "imagenet":  # its classes are in the data, tested with that
        ranked = [*each.CLASSES(None)]
        assert len(set(ranked)) == len(ranked) > 1
        assert all(each.startswith(" ") and each.strip() for each in ranked)


@every
def test_its_copy_on_the_hub_has_its_splits(name):
    copy = getattr(benchmarks.load(name), "HUB", None)
    if copy is not None:
        assert isinstance(copy, hub.Copy) and copy.repo.count("/") == 1
        assert set(copy.splits) <= set(benchmarks.load(name).FILES)
        assert {*copy.only, *copy.at_most} <= set(copy.splits)


@every
def test_data_that_is_not_there_is_one_message(name, tmp_path):
    each = benchmarks.load(name)
    if getattr(each, "BUNDLED", False):
        return
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"\S+ \S+") as said:
            each.examples(folder, each.QUERIES)
        assert str(tmp_path) in str(said.value) and len(str(said.value)) < 500


@pytest.mark.parametrize("name", metrics.names())
def test_a_metric_has_every_name_of_the_contract(name):
    module = metrics.load(name)
    assert isinstance(module.TITLE, str) and module.TITLE and isinstance(module.SCALE, float)
    assert callable(module.per_sample) and callable(module.value)
    if name in JAVA | LOOKING:
        return
    example = Example("1", Path("a.jpg"), "is it a kite?", ("yes",) * 10, "verify")
    other = Example("2", Path("b.jpg"), "is it a boat?", ("no",) * 10, "verify")
    predictions = [Prediction("1", "yes", (-0.1, -2.0)), Prediction("2", "no", (-2.0, -0.1))]
    values = module.per_sample(predictions, [example, other])
    whole = module.value(predictions, [example, other])
    assert isinstance(whole, float) and whole >= 0
    assert values is None or isinstance(values, list)
    if values is not None:
        assert len(values) == 2 and sum(values) / 2 == pytest.approx(whole, abs=1e-9)


def test_a_wrong_name_lists_the_choices():
    with pytest.raises(ValueError, match="choose one of coco.*vqav2"):
        benchmarks.load("imagenet-22k")
    with pytest.raises(ValueError, match="choose one of .*top1"):
        metrics.load("top-1")

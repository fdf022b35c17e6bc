"""Hateful Memes and ImageNet, whose classes are ranked, and their metrics."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from flamingo.eval import metrics
from flamingo.eval.benchmarks import Example, Prediction, _ilsvrc, hateful_memes, imagenet
from flamingo.eval.config import EvalConfig
from flamingo.eval.few_shot import build, choose_shots
from flamingo.eval.metrics import roc_auc, top1
from flamingo.eval.run import Part, check_complete
from flamingo.eval.task import Task
from tests.eval.fixtures_captions import (
    CLASSES,
    write_hateful_memes,
    write_imagenet,
    write_imagenet_devkit,
    write_imagenet_kaggle,
    write_mapping,
)

NAMES = {
    "n01440764": "tench",
    "n02012849": "crane",
    "n02113186": "Cardigan Welsh corgi",
    "n02963159": "cardigan",
    "n03126707": "construction crane",
    "n03710637": "maillot",
    "n03710721": "tank suit",
}


class Ranker:
    """In place of a model: the right class of all but every fourth query, which gets the next one."""

    processor = SimpleNamespace(tokenizer=lambda texts, **_: {"input_ids": [t.split() for t in texts]})

    def rank(self, prompts, classes):
        for number, prompt in enumerate(prompts):
            right = classes.index(f" {prompt.example.answers[0]}")
            chosen = (right + (number % 4 == 3)) % len(classes)
            yield prompt, tuple(-1.0 if each == chosen else -4.0 for each in range(len(classes)))


def answered(name: str, folder: Path, out: Path) -> tuple[list[Prediction], list[Example]]:
    config = EvalConfig(benchmark=name, data=folder, shots=(2,), control_limit=0)
    task, (setting,) = Task.of(config), config.settings()
    out.mkdir()
    Part(task, config, Ranker(), out, 0, 1).run(setting)
    kept = check_complete(task.benchmark, out, setting, task.queries)
    return [Prediction(r["id"], r["prediction"], tuple(r["scores"])) for r in kept], task.queries


def test_memes_are_ranked_yes_or_no(tmp_path):
    write_hateful_memes(tmp_path / "data")
    predictions, queries = answered("hateful_memes", tmp_path / "data", tmp_path / "out")
    assert [e.id for e in queries] == ["8013", "8014", "8015", "8016"]
    assert [e.answers for e in queries] == [("yes",), ("no",), ("yes",), ("no",)]
    assert [p.text for p in predictions] == ["yes", "no", "yes", "yes"]
    assert metrics.load("top1").value(predictions, queries) == 0.75
    assert metrics.load("roc_auc").value(predictions, queries) == 0.75  # of four pairs two are tied


def test_a_meme_s_words_are_in_its_prompt(tmp_path):
    write_hateful_memes(tmp_path)
    config = EvalConfig(benchmark="hateful_memes", data=tmp_path, shots=(2,), control_limit=0)
    task, (setting,) = Task.of(config), config.settings()
    query = task.queries[0]
    prompt = build(hateful_memes, query, choose_shots(task.pool, query, setting), setting)
    assert prompt.text == "<image>is an image with: 'meme 8013' written on it. Is it hateful? Answer:"
    assert prompt.prefix.endswith(f"Answer: {prompt.shots[-1].answers[0]}<|endofchunk|>")


def test_memes_without_labels_are_refused(tmp_path):
    write_hateful_memes(tmp_path)
    path = tmp_path / "test_seen.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in r.items() if k != "label"}) + "\n" for r in rows))
    with pytest.raises(ValueError, match="4 of 4 memes have no label.*--split dev_seen"):
        hateful_memes.examples(tmp_path, "test_seen")
    path.write_text(path.read_text() + "{half a line")
    with pytest.raises(ValueError, match="line 5, is no JSON"):
        hateful_memes.examples(tmp_path, "test_seen")
    path.write_text('{"id": 1, "img": "img/00001.png", "label": 0}\n')
    with pytest.raises(ValueError, match="entry 0, .*text"):
        hateful_memes.examples(tmp_path, "test_seen")


@pytest.mark.parametrize("write", [write_imagenet, write_imagenet_kaggle, write_imagenet_devkit])
def test_imagenet_is_the_same_however_it_is_unpacked(tmp_path, write):
    write(tmp_path)
    queries = imagenet.examples(tmp_path, "val")
    assert [e.id for e in queries] == [f"ILSVRC2012_val_{n:08d}" for n in range(1, len(CLASSES) + 1)]
    assert [e.answers for e in queries] == [(NAMES[wnid],) for wnid in CLASSES]
    shots = imagenet.examples(tmp_path, "train")
    assert [e.id for e in shots[:3]] == ["n01440764_0", "n01440764_1", "n02012849_0"]
    assert all(e.image.exists() for e in [*queries, *shots])
    assert imagenet.CLASSES(tmp_path) == tuple(f" {name}" for name in NAMES.values())


def test_imagenet_classes_are_ranked(tmp_path):
    write_imagenet(tmp_path / "data")
    predictions, queries = answered("imagenet", tmp_path / "data", tmp_path / "out")
    assert all(len(p.scores) == len(CLASSES) for p in predictions)
    assert metrics.load("top1").per_sample(predictions, queries) == [1, 1, 1, 0, 1, 1, 1]
    assert predictions[3].text == "construction crane"  # the query is a cardigan
    # The mean over a name's tokens: the scores of the stand-in, divided by the words of each name.
    words = [len(name.split()) for name in NAMES.values()]
    assert [round(s * n) for s, n in zip(predictions[0].scores, words, strict=True)].count(-4) == len(
        words
    ) - 1


def test_names_of_classes_can_be_replaced(tmp_path):
    write_imagenet(tmp_path)
    names = tmp_path / "classnames.txt"
    names.write_text("".join(f"class {n}\n" for n in range(len(CLASSES))))
    assert imagenet.CLASSES(tmp_path)[2] == " class 2"
    assert imagenet.examples(tmp_path, "val")[2].answers == ("class 2",)
    names.write_text("one\ntwo\n")
    with pytest.raises(ValueError, match="2 names for 7 classes"):
        imagenet.CLASSES(tmp_path)
    names.write_text("one\nOne\n" + "".join(f"{n}\n" for n in range(5)))
    with pytest.raises(ValueError, match="n01440764, n02012849 have the same name 'one'"):
        imagenet.CLASSES(tmp_path)


def test_all_thousand_official_names_are_told_apart():
    """timm ships the official synonyms."""
    import timm.data

    info = Path(timm.data.__file__ or "").parent / "_info"
    lines = (info / "imagenet_synset_to_lemma.txt").read_text().splitlines()
    lemmas = dict(line.split("\t") for line in lines)
    wnids = sorted((info / "imagenet_synsets.txt").read_text().split())
    names = _ilsvrc.readable({wnid: lemmas[wnid] for wnid in wnids})
    assert len({name.casefold() for name in names.values()}) == 1000
    changed = {wnid: name for wnid, name in names.items() if name != lemmas[wnid].split(",")[0]}
    assert changed == {wnid: NAMES[wnid] for wnid in ("n02113186", "n03126707", "n03710721")}


def test_what_imagenet_lacks_is_named(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        imagenet.examples(tmp_path / "nowhere", "val")
    with pytest.raises(ValueError, match="does not tell the names of the classes"):
        imagenet.CLASSES(tmp_path)
    write_mapping(tmp_path)
    with pytest.raises(ValueError, match="has no folder val of pictures"):
        imagenet.examples(tmp_path, "val")
    write_imagenet(tmp_path)
    write_mapping(tmp_path, dict(list(CLASSES.items())[1:]))
    with pytest.raises(ValueError, match="no class 'n01440764'"):
        imagenet.examples(tmp_path, "val")


def test_a_flat_validation_folder_needs_its_labels(tmp_path):
    write_imagenet_kaggle(tmp_path / "kaggle")
    (tmp_path / "kaggle" / "LOC_val_solution.csv").unlink()
    with pytest.raises(ValueError, match="has no folders by class"):
        imagenet.examples(tmp_path / "kaggle", "val")
    write_imagenet_devkit(tmp_path / "kit")
    truth = tmp_path / "kit" / "ILSVRC2012_devkit_t12" / "data" / "ILSVRC2012_validation_ground_truth.txt"
    lines = truth.read_text().splitlines()
    truth.write_text("\n".join(lines[:-1]))
    with pytest.raises(ValueError, match="1 pictures .* in no file of labels, as ILSVRC2012_val_00000007"):
        imagenet.examples(tmp_path / "kit", "val")
    truth.write_text("\n".join([*lines[:-1], "8"]))  # not a leaf of WordNet, so not a class
    with pytest.raises(ValueError, match="8 is no number of a class"):
        imagenet.examples(tmp_path / "kit", "val")


def scored(yes: float, no: float, label: str, number: int = 0) -> tuple[Prediction, Example]:
    return Prediction(str(number), "", (yes, no)), Example(str(number), Path("a.png"), answers=(label,))


def test_roc_auc_is_the_share_of_pairs_in_the_right_order():
    drawn = random.Random(0)
    rows = [scored(drawn.gauss(0, 1), drawn.gauss(0, 1), drawn.choice(["yes", "no"]), n) for n in range(60)]
    predictions, examples = zip(*rows, strict=True)
    margins = {e.id: p.scores[0] - p.scores[1] for p, e in rows}
    hateful = [margins[e.id] for e in examples if e.answers == ("yes",)]
    others = [margins[e.id] for e in examples if e.answers == ("no",)]
    pairs = [float(h > o) + 0.5 * (h == o) for h in hateful for o in others]
    assert roc_auc.value(predictions, examples) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    assert roc_auc.per_sample(predictions, examples) is None


def test_probability_is_the_softmax_and_never_overflows():
    for yes, no in ((-1.0, -2.0), (-3.5, 0.25)):
        share = math.exp(yes) / (math.exp(yes) + math.exp(no))
        assert roc_auc.probability(Prediction("1", "", (yes, no))) == pytest.approx(share, abs=1e-12)
    assert roc_auc.probability(Prediction("1", "", (-1e6, 0.0))) == 0.0
    assert roc_auc.probability(Prediction("1", "", (0.0, -1e6))) == 1.0


def test_roc_auc_says_what_it_cannot_score():
    one_class = [scored(0, -1, "yes", n) for n in range(3)]
    assert math.isnan(roc_auc.value(*zip(*one_class, strict=True)))
    with pytest.raises(ValueError, match="likelihoods of two classes, '1' has 0"):
        roc_auc.value([Prediction("1", "yes")], [one_class[0][1]])
    prediction, example = scored(0, 1, "maybe")
    with pytest.raises(ValueError, match="not yes or no"):
        roc_auc.value([prediction], [example])


def test_top1_tells_a_cardigan_from_a_cardigan():
    examples = [Example(str(n), Path("a.png"), answers=("Cardigan",)) for n in range(2)]
    predictions = [Prediction("0", "cardigan"), Prediction("1", "Cardigan")]
    assert top1.per_sample(predictions, examples) == [0.0, 1.0]
    assert top1.value(predictions, examples) == 0.5

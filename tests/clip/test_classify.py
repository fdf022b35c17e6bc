"""`flamingo clip classify`: probabilities of classes, and accuracies where labels are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from flamingo.data.kinds._members import example_png
from flamingo.data.writing import write_tar
from flamingo.eval import embedding
from flamingo.eval.clip.classify import TEMPLATES, accuracies, class_vectors, read_classes
from flamingo.eval.results.statistics import wilson
from tests.clip.conftest import COLOURS, fails, paint, passes, run

PETS = "cat,dog,parrot"


def answers(done: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in passes(done).splitlines()]


def theirs(encoder: str) -> tuple[Any, Any, Any]:
    """open_clip's own model, preparation of pictures, and tokenizer."""
    name = f"local-dir:{encoder.removeprefix('open_clip:')}"
    made: Any = open_clip.create_model_from_pretrained(name)
    return made[0].eval(), made[1], open_clip.get_tokenizer(name)


# ---- probabilities -------------------------------------------------------------------------------


@pytest.mark.parametrize("templates", [["a photo of a {}."], ["a {}", "{} on a photo", "one {}!"]])
def test_probabilities_are_those_of_open_clips_own_classifier(photos, encoder, templates):
    model, prepare, tokenizer = theirs(encoder)
    classes = open_clip.build_zero_shot_classifier(model, tokenizer, PETS.split(","), templates)
    given = [word for template in templates for word in ("--template", template)]
    found = answers(run("classify", photos, "--encoder", encoder, "--classes", PETS, *given, "--json"))
    assert len(found) == 12
    for answer in found:
        with torch.no_grad():
            picture = prepare(Image.open(answer["where"]).convert("RGB"))[None]
            logits = model.logit_scale.exp() * model.encode_image(picture, normalize=True) @ classes
        expected = dict(zip(PETS.split(","), logits.softmax(-1)[0].tolist(), strict=True))
        assert answer["scores"] == pytest.approx(expected, abs=2e-5)
        assert sum(answer["scores"].values()) == pytest.approx(1, abs=1e-5)
        assert list(answer["scores"].values()) == sorted(answer["scores"].values(), reverse=True)


def test_a_siglip_has_a_probability_of_its_own_for_each_class(photos, siglip):
    model, prepare, tokenizer = theirs(siglip)
    common = ["--encoder", siglip, "--classes", PETS, "--template", "a {}"]
    for answer in answers(run("classify", photos, *common, "--json")):
        with torch.no_grad():
            picture = prepare(Image.open(answer["where"]).convert("RGB"))[None]
            logits, _ = model.get_logits(picture, tokenizer([f"a {name}" for name in PETS.split(",")]))
        expected = dict(zip(PETS.split(","), logits.sigmoid()[0].tolist(), strict=True))
        assert answer["scores"] == pytest.approx(expected, abs=2e-5) and answer["activation"] == "sigmoid"
        assert sum(answer["scores"].values()) != pytest.approx(1, abs=0.05)
    said = passes(run("classify", photos, *common))
    assert said.startswith("sigmoid: each class has a probability of its own")
    assert passes(run("classify", photos, "--encoder", siglip, "--classes", "cat")).count("cat 0.") == 12


def test_a_class_is_the_mean_over_templates_of_length_1(encoder):
    made = embedding.load(encoder)
    found = class_vectors(made, ["cat", "{dog}"], TEMPLATES)
    for row, name in zip(found, ["cat", "{dog}"], strict=True):
        mean = made.embed("text", [t.replace("{}", name) for t in TEMPLATES]).astype(float).mean(0)
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-6)


def test_answers_are_lines_to_read_with_the_likeliest_classes(photos, encoder):
    lines = passes(
        run("classify", photos, "--encoder", encoder, "--classes", PETS, "--top", "2")
    ).splitlines()
    assert len(lines) == 12 and lines[0].startswith("blue/10.png  ")
    assert all(line.count(" 0.") == 2 for line in lines)


def test_single_pictures_and_shards_are_classified(photos, shards, encoder):
    common = ["--encoder", encoder, "--classes", PETS, "--json"]
    (one,) = answers(run("classify", photos / "red" / "0.png", *common))
    assert one["id"] == "0.png"
    assert len(answers(run("classify", photos / "red", shards, *common))) == 13
    without_captions = Path(shards).parent / "bare.tar"
    write_tar(without_captions, [("0", {"png": example_png()})])
    assert len(answers(run("classify", without_captions, *common))) == 1


def test_pictures_are_seen_once_however_many_classes_are_asked(photos, encoder, monkeypatch):
    passes(run("classify", photos, "--encoder", encoder, "--classes", PETS))
    monkeypatch.setattr(embedding.OpenClip, "pictures", None)
    passes(run("classify", photos, "--encoder", encoder, "--classes", "house,boat"))


# ---- labels ------------------------------------------------------------------------------------


def test_accuracies_of_a_folder_of_classes(photos, encoder):
    """Against counting the answers."""
    common = ["--encoder", encoder, "--labels"]
    *found, summary = answers(run("classify", photos, *common, "--json"))
    assert {answer["label"] for answer in found} == set(COLOURS)
    assert all(answer["label"] == Path(answer["where"]).parent.name for answer in found)
    right = sum(next(iter(answer["scores"])) == answer["label"] for answer in found)
    assert summary["pictures"] == 12 and summary["activation"] == "softmax"
    assert summary["top1"] == {"value": right / 12, "interval": list(wilson(right / 12, 12))}
    assert "top5" not in summary  # there are four classes
    said = passes(run("classify", photos, *common))
    assert f"top-1 {100 * right / 12:.1f} %  (95 % interval" in said and "12 pictures)" in said


def test_folders_may_be_called_otherwise_than_their_classes(photos, encoder, tmp_path):
    lines = ["red\tcrimson thing", "gold\tGold", "Blue", "green\tgrass green", "a\t1", "b\t2"]
    (tmp_path / "classes.txt").write_text("\n".join(lines) + "\n\n")
    common = ["--encoder", encoder, "--labels", "--classes", tmp_path / "classes.txt", "--json"]
    *found, summary = answers(run("classify", photos, *common))
    assert {answer["label"] for answer in found} == {"crimson thing", "Gold", "Blue", "grass green"}
    assert summary["top1"]["value"] <= summary["top5"]["value"]
    paint(photos / "red_parrot" / "0.png", 3)
    fails(run("classify", photos, *common), "'red_parrot'", "is none of the 6 classes")


def test_shards_say_their_classes_by_number_or_by_caption(shards, encoder, tmp_path):
    common = ["--encoder", encoder, "--labels", "--json"]
    *found, _ = answers(run("classify", shards, *common, "--classes", ",".join(COLOURS)))
    assert [answer["label"] for answer in found] == [COLOURS[number % 4] for number in range(10)]
    fails(run("classify", shards, *common), "'0' is the number of a class, not its name")
    fails(run("classify", shards, *common, "--classes", "a,b,c"), "'3' of", "is none of the 3 classes")
    write_tar(tmp_path / "c.tar", [(n, {"png": example_png(n), "txt": n.encode()}) for n in ("red", "blue")])
    *found, _ = answers(run("classify", tmp_path / "c.tar", *common))
    assert [answer["label"] for answer in found] == ["red", "blue"]


def test_top_k_counts_places_with_wilsons_interval():
    places = [0, 0, 1, 4, 5, 9]
    assert accuracies(places, 10) == {1: (2 / 6, wilson(2 / 6, 6)), 5: (4 / 6, wilson(4 / 6, 6))}
    assert set(accuracies(places, 5)) == {1}


# ---- what cannot be asked -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        ("cat,dog,Cat", "'Cat' stands there twice"),
        ("cat,,dog", "an empty name"),
        ("", "an empty name"),
        ("cat", "'cat' alone, whose probability is always 1"),
        ("no/such/classes.txt", "there is no such file"),
    ],
)
def test_class_lists_that_say_nothing_are_refused(photos, encoder, classes, said):
    fails(run("classify", photos, "--encoder", encoder, "--classes", classes), said)


def test_files_of_classes_are_checked_too(photos, encoder, tmp_path):
    file = tmp_path / "classes"
    for text, said in (("\n \n", "the file holds no name"), ("a\tcat\nb\tcat\n", "'cat' stands there twice"),
                       ("a\tcat\na\tdog\n", "'a' stands there twice")):  # fmt: skip
        file.write_text(text)
        fails(run("classify", photos, "--encoder", encoder, "--classes", file), said)
    file.write_bytes(example_png())
    fails(run("classify", photos, "--encoder", encoder, "--classes", file), "not a text file in UTF-8")


def test_long_lists_are_no_file_names():
    assert len(read_classes(",".join(f"class number {n}" for n in range(1000)))) == 1000


@pytest.mark.parametrize("template", ["a photo", "{} and {}"])
def test_a_template_has_one_place_for_the_class(photos, encoder, template):
    done = run("classify", photos, "--encoder", encoder, "--classes", PETS, "--template", template)
    fails(done, f"template {template!r}: write {{}} once")


def test_without_classes_or_labels_nothing_can_be_said(photos, encoder, tmp_path):
    fails(run("classify", photos, "--encoder", encoder), "--classes is missing")
    paint(photos / "loose.png", 7)
    fails(
        run("classify", photos, "--encoder", encoder, "--labels"), "1 of 13 pictures have none", "loose.png"
    )


def test_an_encoder_without_a_common_space_cannot_classify(photos, tmp_path):
    from tests.eval.harness_model import write_model

    done = run("classify", photos, "--encoder", f"model:{write_model(tmp_path / 'model')}", "--classes", PETS)
    fails(done, "no space that pictures and texts share: use an encoder of open_clip")


def test_broken_pictures_are_left_out_of_the_accuracy(photos, encoder):
    (photos / "red" / "broken.png").write_text("no picture")
    done = run("classify", photos, "--encoder", encoder, "--labels", "--json")
    assert json.loads(passes(done).splitlines()[-1])["pictures"] == 12
    assert "broken.png: damaged image" in done.stderr

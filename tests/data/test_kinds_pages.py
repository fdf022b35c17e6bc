"""Web pages (mmc4, OBELICS) and questions: which images are kept, where they stand, what is learned."""

from __future__ import annotations

import base64
import json
import struct
import zlib

import pytest

from flamingo.data.config import SourceConfig
from flamingo.data.document import Image, Text
from flamingo.data.errors import BadSample
from flamingo.data.kinds import load_kind, reader
from flamingo.data.kinds._members import example_png as png
from flamingo.data.kinds._members import size
from flamingo.data.stream import Stream

SENTENCES = ["s0", "s1", "s2", "s3"]
# Image 0 is published with sentence 2, image 1 with sentence 1; both look most like sentence 1.
MATRIX = [[0.1, 0.5, 0.3, 0.0], [0.0, 0.4, 0.0, 0.1]]


def page(**changed) -> dict[str, bytes]:
    info = [
        {"image_name": "a.png", "matched_text_index": 2, "matched_sim": 0.3},
        {"image_name": "B.PNG", "matched_text_index": 1, "matched_sim": 0.4},
    ]
    fields = {"text_list": SENTENCES, "image_info": info, "similarity_matrix": MATRIX, **changed}
    return {"json": json.dumps(fields).encode(), "a.png": png("red"), "b.png": png("blue")}


def spell(document) -> str:
    """R and B for the pictures, words for the texts."""
    names = {(255, 0, 0): "R", (0, 0, 255): "B"}
    return " ".join(
        item.text if isinstance(item, Text) else names[item.image.getpixel((0, 0))]
        for item in document.items
        if isinstance(item, (Text, Image))
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "s0 B s1 R s2 s3"),
        ({"image_place": "after"}, "s0 s1 B s2 R s3"),
        ({"min_similarity": 0.35}, "s0 B s1 s2 s3"),
        ({"max_images": 1}, "s0 B s1 s2 s3"),
        ({"assignment": "best"}, "s0 R B s1 s2 s3"),
        ({"assignment": "best", "max_images": 1}, "s0 R s1 s2 s3"),
        ({"assignment": "optimal"}, "s0 B s1 R s2 s3"),
        ({"assignment": "optimal", "min_similarity": 0.0}, "s0 B s1 R s2 s3"),
    ],
)
def test_an_mmc4_image_stands_beside_the_sentence_that_the_options_give_it(options, expected):
    assert spell(reader("mmc4", options)(page(), "k")) == expected


def test_an_mmc4_page_may_hold_its_images_as_base64():
    sample = page()
    info = [
        {"image_base64": base64.b64encode(png("red")).decode(), "matched_text_index": 0, "matched_sim": 1}
    ]
    fields = {"text_list": ["s0"], "image_info": info}
    assert spell(load_kind("mmc4").read({"json": json.dumps(fields).encode()}, "k")) == "R s0"
    assert size(sample["a.png"]) == (8, 8)


@pytest.mark.parametrize(
    ("changed", "options", "fault"),
    [
        ({}, {"min_similarity": 0.9}, "no image"),
        ({}, {"min_side": 9}, "no image"),
        ({"image_info": []}, {}, "bad json"),  # the matrix is of two images
        ({"image_info": [], "similarity_matrix": []}, {}, "no image"),
        ({"text_list": ["", " ", "", ""]}, {}, "no text"),
        ({"text_list": "s0"}, {}, "bad json"),
        ({"similarity_matrix": [[0.1], [0.2]]}, {}, "bad json"),
        ({"similarity_matrix": None}, {"assignment": "best"}, "bad json"),
        ({"similarity_matrix": [[float("nan")] * 4] * 2}, {"assignment": "optimal"}, "bad json"),
        ({"image_info": [{"image_name": "../a.png"}], "similarity_matrix": None}, {}, "missing member"),
        ({"image_info": [{"image_name": "a.png", "matched_text_index": 9, "matched_sim": 1}],
          "similarity_matrix": None}, {}, "bad json"),
        ({"image_info": [{"image_base64": "%%"}], "similarity_matrix": None}, {}, "bad base64"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_an_mmc4_page_has_a_name(changed, options, fault):
    with pytest.raises(BadSample) as caught:
        reader("mmc4", options)(page(**changed), "k")
    assert caught.value.fault == fault


def test_a_picture_whose_header_announces_too_many_pixels_is_told_as_that():
    small = png()
    head = b"IHDR" + struct.pack(">II", 30_000, 30_000) + small[24:29]
    huge = small[:12] + head + struct.pack(">I", zlib.crc32(head)) + small[33:]
    for kind, member in (("mmc4", "a.png"), ("obelics", "0.png"), ("pairs", "png")):
        sample = {**load_kind(kind).example(), member: huge}
        with pytest.raises(BadSample) as caught:
            reader(kind, {})(sample, "k")
        assert caught.value.fault == "too large image"


def obelics(texts: list, images: list, **options):
    sample = {"json": json.dumps({"texts": texts, "images": images}).encode()}
    sample |= {"0.png": png("red"), "2.png": png("blue"), "named.png": png("blue")}
    return reader("obelics", options)(sample, "k")


def test_an_obelics_page_keeps_the_order_of_its_lists():
    texts, images = [None, "x", None, "y"], ["https://a/b.png", None, "https://a/c.png", None]
    assert spell(obelics(texts, images)) == "R x B y"
    assert spell(obelics(texts, ["named.png", None, "https://a/c.png", None])) == "B x B y"
    one = obelics(texts, images, max_images=1)
    assert spell(one) == "R x\n\ny"
    data = f"data:image/png;base64,{base64.b64encode(png('blue')).decode()}"
    assert spell(obelics(["x", None], [None, data])) == "x B"


@pytest.mark.parametrize(
    ("texts", "images", "options", "fault"),
    [
        (["x"], [], {}, "bad json"),
        (["x"], ["y"], {}, "bad json"),
        ([None], [None], {}, "bad json"),
        (["x"], [None], {}, "no image"),
        ([None, " "], ["u", None], {}, "no text"),
        ([None, "x"], ["u", None], {"min_side": 9}, "no image"),
        (["x", None], [None, "u"], {}, "missing member"),  # 1.png is not there
        (["x", None], [None, 7], {}, "bad text"),
    ],
)
def test_what_is_wrong_with_an_obelics_page_has_a_name(texts, images, options, fault):
    with pytest.raises(BadSample) as caught:
        obelics(texts, images, **options)
    assert caught.value.fault == fault


def vqa(fields: dict, **options) -> list:
    sample = {"jpeg": png("red"), "json": json.dumps(fields).encode()}
    items = reader("vqa", options)(sample, "k").items
    return ["I" if isinstance(i, Image) else (i.text, i.loss) for i in items if isinstance(i, (Image, Text))]


def test_the_questions_of_a_picture_are_turns_of_one_document():
    fields = {"questions": [{"question": "a?", "answer": "x"}, {"question": "{b}?", "answers": ["y"]}]}
    prompts = [("Question: a? Answer:", False), ("Question: {b}? Answer:", False)]
    assert vqa(fields) == ["I", prompts[0], (" x\n", True), prompts[1], (" y", True)]
    assert vqa(fields, between=" ;") == ["I", prompts[0], (" x ;", True), prompts[1], (" y", True)]
    assert vqa(fields, image_per_turn=True) == ["I", prompts[0], (" x", True), "I", prompts[1], (" y", True)]
    short = vqa({"question": "a?", "answer": "x"}, prompt="{question}", answer="{answer}.")
    assert short == ["I", ("a?", False), ("x.", True)]


def test_of_several_answers_the_options_say_which():
    answers = [{"answer": "x", "answer_id": 1}, {"answer": "y"}, "y", "x ", "y"]
    fields = {"question": "a?", "answers": answers}

    def learned(**options) -> list[str]:
        return [said[0].strip() for said in vqa(fields, **options) if said != "I" and said[1]]

    assert learned() == ["y"]
    assert learned(pick="first") == ["x"]
    assert learned(pick="all") == ["x", "y", "y", "x", "y"]


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({}, "bad json"),
        ({"questions": []}, "no text"),
        ({"questions": {"question": "a"}}, "bad json"),
        ({"questions": ["a"]}, "bad json"),
        ({"question": " ", "answer": "x"}, "no text"),
        ({"question": "a?", "answers": []}, "no text"),
        ({"question": "a?", "answers": "x"}, "bad json"),
        ({"question": "a?", "answers": [7]}, "bad text"),
        ({"question": "a?"}, "no text"),
    ],
)
def test_what_is_wrong_with_a_question_has_a_name(fields, fault):
    with pytest.raises(BadSample) as caught:
        vqa(fields)
    assert caught.value.fault == fault


def test_a_template_without_its_field_is_refused():
    with pytest.raises(ValueError, match=r"kind 'vqa', option 'prompt'.*must hold \{question\}"):
        reader("vqa", {"prompt": "Q:"})


@pytest.mark.parametrize("kind", ["mmc4", "obelics", "vqa", "video", "pairs", "interleaved"])
def test_a_shard_of_every_kind_is_read_through_the_stream(kind, write_tar):
    module = load_kind(kind)
    path = write_tar("shard.tar", {f"{n:03d}": module.example() for n in range(4)})
    source = SourceConfig(name="s", kind=kind, shards=str(path), batch=1, max_tokens=64)
    stream = Stream(source, seed=0)
    keys = {stream[position].key for position in range(4)}
    assert keys == {f"s/shard.tar/{n:03d}" for n in range(4)}

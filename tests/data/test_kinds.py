"""Every file in the folder of kinds keeps the contract: a Document, or BadSample."""

from __future__ import annotations

import contextlib
import json

import pytest

from flamingo.data.document import Document, Image, Text, content_key
from flamingo.data.errors import BadSample
from flamingo.data.kinds import interleaved, kind_names, load_kind, pairs
from flamingo.data.kinds._members import example_png as png


def test_the_folder_is_walked():
    assert {"interleaved", "pairs"} <= set(kind_names())


@pytest.mark.parametrize("name", kind_names())
def test_the_example_of_a_kind_becomes_a_document(name):
    kind = load_kind(name)
    document = kind.read(kind.example(), "source/shard/key")
    assert isinstance(document, Document)
    assert document.key == "source/shard/key"
    assert any(isinstance(item, Text) and item.loss for item in document.items)
    for item in document.items:
        assert not isinstance(item, Image) or (item.image.mode == "RGB" and len(item.key) == 32)
    assert [i.key for i in document.items if isinstance(i, Image)] == [
        i.key for i in kind.read(kind.example(), "elsewhere").items if isinstance(i, Image)
    ]


@pytest.mark.parametrize("name", kind_names())
def test_damage_to_any_member_is_a_bad_sample_and_nothing_else(name):
    kind = load_kind(name)
    example = kind.example()
    with pytest.raises(BadSample):
        kind.read({}, "key")
    for member, data in example.items():
        with pytest.raises(BadSample):
            kind.read({k: v for k, v in example.items() if k != member}, "key")
        damaged = [
            b"",
            b"\xff\xfe\x00garbage",
            b"null",
            b'{"a": ' * 100_000,
            b"[]",
            b"\xed\xa0\x80",
        ]
        damaged += [data[: len(data) * i // 8] for i in range(8)]
        damaged += [data[:i] + b"\0\0\0\0" + data[i + 4 :] for i in range(0, len(data), 7)]
        for bad in damaged:
            with contextlib.suppress(BadSample):  # any other error fails the test
                assert kind.read({**example, member: bad}, "key").items


def test_an_unknown_kind_lists_the_choices():
    with pytest.raises(ValueError, match=r"'pears': choose one of interleaved, .*pairs, .*, or"):
        load_kind("pears")
    with pytest.raises(ValueError, match=r"no module 'my_lab'.*interleaved, .*pairs"):
        load_kind("my_lab.comics")
    with pytest.raises(ValueError, match="no function read"):
        load_kind("flamingo.data.errors")
    with pytest.raises(ValueError, match="unknown kind '_members'"):
        load_kind("_members")


def test_a_kind_can_live_outside_the_package():
    assert load_kind("flamingo.data.kinds.pairs") is pairs


@pytest.mark.parametrize("extension", pairs.IMAGES)
@pytest.mark.parametrize(
    "text",
    [{"txt": b" a b\n"}, {"json": b'{"caption": "a b"}'}, {"json": b'{"text": "a b"}'},
     {"txt": b"a b", "json": b"no json at all"}],
)  # fmt: skip
def test_a_pair_is_a_picture_and_its_caption(extension, text):
    image, caption = pairs.read({extension: png(), **text}, "k").items
    assert isinstance(image, Image)
    assert image.key == content_key(png())
    assert caption == Text("a b")


@pytest.mark.parametrize(
    ("sample", "fault"),
    [
        ({"txt": b"a"}, "missing member"),
        ({"png": png(), "jpg": png(), "txt": b"a"}, "too many images"),
        ({"png": png()}, "missing member"),
        ({"png": png(), "txt": b" \n"}, "no text"),
        ({"png": png(), "json": b'{"url": "x"}'}, "no text"),
        ({"png": png(), "json": b'{"caption": 7}'}, "bad text"),
        ({"png": png(), "json": b'{"caption": "\\ud800"}'}, "bad text"),
        ({"png": b"<html>", "txt": b"a"}, "damaged image"),
    ],
)
def test_what_is_wrong_with_a_pair_has_a_name(sample, fault):
    with pytest.raises(BadSample) as caught:
        pairs.read(sample, "k")
    assert caught.value.fault == fault


def interleave(*items: object) -> Document:
    data = {
        "json": json.dumps({"items": items}).encode(),
        "0.png": png("red"),
        "1.png": png("blue"),
    }
    return interleaved.read(data, "k")


def test_an_interleaved_document_keeps_order_masks_and_repeated_pictures():
    document = interleave(
        {"text": "a"}, {"image": "1.PNG"}, {"text": "q", "loss": False}, {"text": " b"},
        {"image": "1.PNG"}, {"image": "0.png"},
    )  # fmt: skip
    a, first, q, b, again, other = document.items
    assert [a, q, b] == [Text("a"), Text("q", loss=False), Text(" b")]
    assert first is again
    assert isinstance(first, Image)
    assert isinstance(other, Image)
    assert first.image.getpixel((0, 0)) == (0, 0, 255)
    assert first.key != other.key


@pytest.mark.parametrize(
    ("items", "fault"),
    [
        ([{"text": "a"}, {"image": "../../etc/passwd"}], "missing member"),
        ([{"text": "a"}, {"image": 7}], "bad text"),
        ([{"text": "a", "image": "0.png"}], "bad json"),
        ([{"text": "a", "loss": 1}], "bad json"),
        ([{"caption": "a"}], "bad json"),
        (["a"], "bad json"),
        ([{"image": "0.png"}, {"text": "q", "loss": False}], "no text"),
        ([], "no text"),
    ],
)
def test_what_is_wrong_with_an_interleaved_document_has_a_name(items, fault):
    with pytest.raises(BadSample) as caught:
        interleave(*items)
    assert caught.value.fault == fault

"""What a row holds, where the loss is, and which pictures go with it."""

from __future__ import annotations

import PIL.Image
import pytest
import torch

from flamingo.data.batch import IGNORE, Collator
from flamingo.data.document import Document, Image, Text

I1, I2, I3 = (
    Image(PIL.Image.new("RGB", (4, 4), (value, 0, 0)), key)
    for value, key in ((0, "i1"), (100, "i2"), (200, "i3"))
)
Q, Q2 = Text("q ?", loss=False), Text("q q ?", loss=False)
A, B = Text(" a"), Text(" b c")


@pytest.fixture
def collate(tokenizer, transform):
    def call(*documents, max_tokens=32, skip_pixels=None):
        collator = Collator(tokenizer, transform, 1, 2, max_tokens)
        return collator([Document(tuple(items), f"d{n}") for n, items in enumerate(documents)], skip_pixels)

    return call


@pytest.fixture
def words(tokenizer):
    def call(ids) -> str:
        return " ".join("-" if i == IGNORE else tokenizer.convert_ids_to_tokens(i) for i in ids.tolist())

    return call


@pytest.mark.parametrize(
    ("learn", "labels"),
    [
        ("marked", "a <eoc> - - - b c <eoc>"),
        ("all", "a <eoc> - q ? b c <eoc>"),
        ("after_first_image", "- - - - - b c <eoc>"),
        ("last", "a <eoc> - - - b c <eoc>"),
    ],
)
def test_what_is_learned_is_the_sources_choice(tokenizer, transform, words, learn, labels):
    collator = Collator(tokenizer, transform, 1, 2, 32, learn=learn)
    batch = collator([Document((A, I1, Q, B), "d")])
    assert words(batch.labels[0]) == labels


def test_of_unmarked_texts_the_last_one_of_a_turn_is_the_answer(tokenizer, transform, words):
    collator = Collator(tokenizer, transform, 1, 2, 32, learn="last")
    batch = collator([Document((I1, Text("q ?"), A), "d")])
    assert words(batch.labels[0]) == "- - - a <eoc>"


@pytest.mark.parametrize(
    ("items", "tokens", "labels"),
    [
        # a caption pair
        ([I1, B], "<image> b c <eoc>", "- b c <eoc>"),
        # turns with masked questions
        (
            [I1, Q, A, I2, Q, B],
            "<image> q ? a <eoc> <image> q ? b c <eoc>",
            "- - - a <eoc> - - - b c <eoc>",
        ),
        # a run that ends without loss ends without loss on its <eoc>
        ([I1, A, Q, I2, B], "<image> a q ? <eoc> <image> b c <eoc>", "- a - - - - b c <eoc>"),
        # text first, two pictures in a row, a picture last
        (
            [A, I1, I2, B, I3],
            "a <eoc> <image> <image> b c <eoc> <image>",
            "a <eoc> - - b c <eoc> -",
        ),
        # text alone
        ([Q, A], "q ? a <eoc>", "- - a <eoc>"),
        # an empty text is no run
        ([I1, Text(""), I2, A], "<image> <image> a <eoc>", "- - a <eoc>"),
        # a spelt-out special token is no picture
        ([I1, Text("a <image> b <eoc> c")], "<image> a b c <eoc>", "- a b c <eoc>"),
        ([Text("<image>")], "<eoc>", "-"),
    ],
)
def test_tokens_and_labels_of_a_document(collate, words, items, tokens, labels):
    batch = collate(items)
    assert words(batch.input_ids[0]) == tokens
    assert words(batch.labels[0]) == labels
    images = sum(isinstance(item, Image) for item in items)
    assert len(batch.image_keys) == images == (batch.input_ids == 1).sum()


@pytest.mark.parametrize(
    ("limit", "tokens", "keys"),
    [
        (11, "<image> q ? a <eoc> <image> q ? b c <eoc>", ["i1", "i2"]),
        (10, "<image> q ? a <eoc>", ["i1"]),  # the second turn does not fit in full
        (5, "<image> q ? a <eoc>", ["i1"]),
        (4, "<image> q ? a", ["i1"]),  # already the first does not
        (2, "<image> q", ["i1"]),
    ],
)
def test_long_documents_are_cut_by_whole_turns_if_possible(collate, words, limit, tokens, keys):
    batch = collate([I1, Q, A, I2, Q, B], max_tokens=limit)
    assert words(batch.input_ids[0]) == tokens
    assert batch.image_keys == keys
    assert len(batch.pixel_values) == len(keys)


def test_a_cut_between_pictures_leaves_none_without_its_token(collate, words):
    batch = collate([I1, I2, I3, A], max_tokens=2)
    assert words(batch.input_ids[0]) == "<image> <image>"
    assert batch.image_keys == ["i1", "i2"]
    assert batch.n_targets == 0


def test_rows_are_padded_on_the_right_and_images_are_not_padded(collate, words):
    batch = collate([I2, B], [Q, A, B, B], [I1, Q, A, I3, A])
    assert batch.input_ids.dtype == batch.labels.dtype == batch.attention_mask.dtype == torch.int64
    assert batch.input_ids.shape == (3, 8)
    assert batch.attention_mask.tolist() == [[1] * 4 + [0] * 4, [1] * 8, [1] * 8]
    assert words(batch.input_ids[0]) == "<image> b c <eoc> <pad> <pad> <pad> <pad>"
    assert (batch.labels[batch.attention_mask == 0] == IGNORE).all()
    assert (batch.labels[batch.input_ids == 1] == IGNORE).all()
    assert batch.image_keys == ["i2", "i1", "i3"]
    assert batch.pixel_index.tolist() == [0, 1, 2]
    red = (batch.pixel_values[:, 0, 0, 0] * 0.5 + 0.5) * 255
    assert red.round().tolist() == [100, 0, 200]
    assert batch.keys == ["d0", "d1", "d2"]


def test_targets_are_counted_as_the_shifted_loss_counts_them(collate):
    assert collate([I1, B]).n_targets == 3
    assert collate([A]).n_targets == 1  # nothing predicts the first token
    assert collate([I1, B], [I1, Q, A]).n_targets == 5


def test_skipped_pixels_are_absent_and_others_are_there_once(collate):
    asked = []
    batch = collate([I1, A, I2, A], [I2, B, I1, A], skip_pixels=lambda k: asked.append(k) or k == "i1")
    assert batch.image_keys == ["i1", "i2", "i2", "i1"]
    assert batch.pixel_index.tolist() == [-1, 0, 0, -1]
    assert batch.pixel_values.shape == (1, 3, 4, 4)
    assert asked == ["i1", "i2"]


def test_a_batch_without_pictures_has_pixels_of_no_pictures(collate):
    batch = collate([A])
    assert batch.pixel_values.shape == (0, 3, 4, 4)
    assert batch.pixel_index.shape == (0,)


def test_a_batch_moves_without_changing_types(collate):
    batch = collate([I1, A])
    moved = batch.to("meta")
    assert moved.input_ids.device.type == moved.pixel_values.device.type == "meta"
    assert moved.input_ids.dtype == torch.int64
    assert moved.image_keys == batch.image_keys


def test_all_tensors_of_a_batch_are_pinned(collate, monkeypatch):
    """As a loader does it where there is a GPU."""
    batch = collate([Text("a")])
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    pinned = batch.pin_memory()
    tensors = {name for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    assert len(tensors) == 5
    assert all(getattr(pinned, name) is not getattr(batch, name) for name in tensors)


def test_a_tokenizer_without_padding_token_pads_all_the_same(tokenizer, transform):
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    collator = Collator(bare, transform, 1, 2, 8)
    batch = collator([Document((A,), "x"), Document((B, B), "y")])
    assert batch.attention_mask[0].tolist() == [1, 1, 0, 0, 0]


def test_wrong_settings_are_named(tokenizer, transform):
    with pytest.raises(ValueError, match="max_tokens must be at least 2"):
        Collator(tokenizer, transform, 1, 2, 1)
    with pytest.raises(ValueError, match="same token id 1"):
        Collator(tokenizer, transform, 1, 1, 8)
    with pytest.raises(ValueError, match="at least one document"):
        Collator(tokenizer, transform, 1, 2, 8)([])

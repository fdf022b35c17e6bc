"""Documents of several sources share rows, and nothing of one shows in another."""

from __future__ import annotations

import pytest
import torch

from flamingo import runtime
from flamingo.data.batch import IGNORE, Batch
from flamingo.data.packing import packed, padded

IMAGE, END = 90, 91


def batch(*documents: str, first: int = 0, known: tuple[str, ...] = ()) -> Batch:
    """Documents of I (image) and letters (text with loss), padded; `known` pictures have no pixels."""
    rows = [[IMAGE if letter == "I" else ord(letter) - 96 for letter in text] for text in documents]
    longest = max(map(len, rows))
    keys = [f"{first + i}.{n}" for i, text in enumerate(documents) for n in range(text.count("I"))]
    fresh = [key for key in keys if key not in known]

    def pad(row: list[int], fill: int) -> list[int]:
        return row + [fill] * (longest - len(row))

    return Batch(
        input_ids=torch.tensor([pad(row, 0) for row in rows]),
        attention_mask=torch.tensor([pad([1] * len(row), 0) for row in rows]),
        labels=torch.tensor([pad([IGNORE if t == IMAGE else t for t in row], IGNORE) for row in rows]),
        pixel_values=torch.tensor([float(fresh.index(k) + 10 * first) for k in fresh]).view(-1, 1, 1, 1),
        pixel_index=torch.tensor([fresh.index(k) if k in fresh else -1 for k in keys], dtype=torch.int64),
        image_keys=keys,
        keys=[str(first + i) for i in range(len(documents))],
    )


def documents(rows) -> list[tuple[int, tuple[int, ...]]]:
    """(source, tokens) of each segment that is not padding, with the last token, of which only the label
    is there: at the first token of the next."""
    found = []
    for ids, labels, source, segments in zip(
        rows.input_ids, rows.labels, rows.source, rows.segment_ids, strict=True
    ):
        for number in range(int(segments.max()) + 1):
            inside = (segments == number).nonzero().squeeze(1)
            assert inside.diff().eq(1).all()  # in one piece
            tokens, last = ids[inside].tolist(), int(inside[-1])
            if number < segments.max():
                last += 1
                tokens.append(int(labels[last]))
            found.append((int(source[last]), tuple(tokens)))
    return found


CAPTIONS, TURNS = batch("Iab", "Ic"), batch("aIbIcd", "efg", first=5)


@pytest.mark.parametrize("row_tokens", [6, 7, 9, 14, 100])
def test_every_document_stands_in_one_piece_in_one_row(row_tokens):
    (rows,) = packed([CAPTIONS, TURNS], row_tokens, IMAGE)
    text = lambda s: tuple(IMAGE if c == "I" else ord(c) - 96 for c in s)  # noqa: E731
    expected = [(0, text("Iab")), (0, text("Ic")), (1, text("aIbIcd")), (1, text("efg"))]
    assert sorted(documents(rows)) == sorted(expected)
    assert rows.input_ids.shape[1] <= row_tokens
    assert rows.attention_mask is None


def test_one_long_row_has_no_padding():
    (rows,) = packed([CAPTIONS, TURNS], 100, IMAGE)
    assert rows.input_ids.shape == (1, 14 - 3) and (rows.segment_ids >= 0).all()


def test_no_last_token_is_read_but_at_the_end_of_a_row_and_of_pictures():
    """What follows it is nothing. `n` has no loss there."""
    sources = [batch("Iab", "abI"), batch("IaIbcn", "Id", first=5)]
    sources[1].labels[0, 5] = IGNORE
    (rows,) = packed(sources, 100, IMAGE)
    I, a, b, c, d = IMAGE, 1, 2, 3, 4  # noqa: E741
    assert rows.input_ids.tolist() == [[I, a, I, b, c, I, a, a, b, I, I, d]]
    assert rows.segment_ids.tolist() == [[0, 0, 0, 0, 0, 1, 1, 2, 2, 2, 3, 3]]
    X = IGNORE
    assert rows.labels.tolist() == [[X, a, X, b, c, X, a, b, b, X, X, d]]
    assert rows.target_source.tolist() == [1, 1, 1, 0, 0, 0, 1]
    assert rows.image_keys == ["5.0", "5.1", "0.0", "1.0", "6.0"]


def test_rows_are_level_so_that_few_are_filled_up():
    many = batch("Iabcd", "Iabcd", "Iabcd", "Iabcd", "Ia", "Ia")  # 24 tokens
    (rows,) = packed([many], 18, IMAGE)
    assert rows.input_ids.shape == (2, 12 - 2) and (rows.segment_ids >= 0).all()


@pytest.mark.parametrize(
    ("lengths", "row_tokens", "expected"),
    [((50,), 100, 50), ((51,), 100, 52), ((150, 147), 150, 150), ((150, 147), 160, 152), ((401,), 512, 416)],
)
def test_rows_have_lengths_that_come_again_but_no_longer_than_allowed(
    monkeypatch, lengths, row_tokens, expected
):
    """Else each step's matrices have sizes of their own, for which libraries prepare each product anew."""
    monkeypatch.setattr(runtime, "arithmetic", lambda: "bfloat16")  # whose products are prepared
    documents_of = batch(*("I" + "a" * (length - 1) for length in lengths))
    (rows,) = packed([documents_of], row_tokens, IMAGE)
    assert rows.input_ids.shape == (len(lengths), expected)
    assert (rows.segment_ids >= 0).sum() == sum(lengths)
    filled = rows.segment_ids < 0
    assert (rows.labels[filled] == IGNORE).all() and len(rows.target_source) == documents_of.n_targets


def test_images_count_with_all_tokens_that_the_lm_reads():
    """aIbIcd is 6 tokens in its row, 12 with 4 an image; Iab 3 and 6, Ic 2 and 5, efg 3."""
    (short,) = packed([CAPTIONS, TURNS], 12, IMAGE)
    assert len(short.input_ids) == 2
    (rows,) = packed([CAPTIONS, TURNS], 12, IMAGE, image_tokens=4)
    lengths = [
        (row >= 0).sum() + 3 * (ids == IMAGE).sum()
        for row, ids in zip(rows.segment_ids, rows.input_ids, strict=True)
    ]
    assert sorted(int(length) for length in lengths) == [3, 11 - 1, 12]
    with pytest.raises(
        ValueError, match="a document of 12 tokens does not fit .* row of 11: raise pack_tokens"
    ):
        packed([TURNS], 11, IMAGE, image_tokens=4)


def test_padding_is_a_segment_of_its_own_without_loss():
    (rows,) = packed([CAPTIONS, TURNS], 8, IMAGE)
    padding = rows.segment_ids < 0
    assert padding.any() and (rows.labels[padding] == IGNORE).all()


def test_no_document_predicts_the_first_token_of_the_next():
    (rows,) = packed([CAPTIONS, TURNS], 100, IMAGE)
    starts = torch.ones_like(rows.segment_ids, dtype=torch.bool)
    starts[:, 1:] = rows.segment_ids.diff(dim=1) != 0
    assert rows.labels[starts].tolist() == [IGNORE, 4, 2, 7]  # the last tokens of aIbIcd, Iab and efg
    assert len(rows.target_source) == CAPTIONS.n_targets + TURNS.n_targets
    assert rows.target_source.bincount().tolist() == [CAPTIONS.n_targets, TURNS.n_targets]


def test_images_follow_the_order_of_their_tokens():
    (rows,) = packed([CAPTIONS, TURNS], 100, IMAGE)
    assert rows.image_keys == ["5.0", "5.1", "0.0", "1.0"]  # longest document first
    assert rows.pixel_values[rows.pixel_index].flatten().tolist() == [50.0, 51.0, 0.0, 1.0]


def test_pictures_without_pixels_stay_marked():
    turns = batch("aIbIcd", first=5, known=("5.0",))
    (rows,) = packed([batch("Iab", "Ic", known=("0.0",)), turns], 100, IMAGE)
    assert rows.image_keys == ["5.0", "5.1", "0.0", "1.0"]
    assert [int(i) for i in rows.pixel_index] == [-1, 1, -1, 0]
    assert rows.pixel_values.flatten().tolist() == [0.0, 50.0]


def test_a_source_that_has_not_joined_keeps_the_others_numbers():
    (rows,) = packed([None, TURNS], 100, IMAGE)
    assert set(rows.target_source.tolist()) == {1}
    (rows,) = padded([None, TURNS])
    assert set(rows.target_source.tolist()) == {1}


def test_a_document_longer_than_a_row_is_named_with_the_setting():
    with pytest.raises(ValueError, match="6 tokens .* row of 5.*pack_tokens"):
        packed([TURNS], 5, IMAGE)


def test_padded_rows_are_the_batches_themselves():
    rows = padded([CAPTIONS, TURNS])
    assert [r.input_ids.shape for r in rows] == [CAPTIONS.input_ids.shape, TURNS.input_ids.shape]
    assert all(r.segment_ids is None for r in rows)
    assert sum(len(r.target_source) for r in rows) == CAPTIONS.n_targets + TURNS.n_targets

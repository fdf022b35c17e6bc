"""Which image may each text token see."""

from __future__ import annotations

import pytest
import torch

from flamingo import runtime
from flamingo.media import (
    PIECE,
    Runs,
    image_offsets,
    immediate_image,
    next_image,
    restarting_positions,
    sight,
)
from flamingo.runtime import recurring

IMAGE, PAD = 99, 0


def tokens(*rows: str) -> torch.Tensor:
    """Ids of rows of t (text), I (image) and p (padding)."""
    meaning = {"t": 7, "I": IMAGE, "p": PAD}
    return torch.tensor([[meaning[letter] for letter in row] for row in rows])


@pytest.mark.parametrize(
    ("rows", "seen"),
    [
        (["Itt"], [[0, 0, 0]]),
        (["ttItt"], [[-1, -1, 0, 0, 0]]),  # text before any image sees none
        (["ItIt"], [[0, 0, 1, 1]]),  # only the image just before, not an earlier one
        (["IIt"], [[0, 1, 1]]),  # two in a row: the text follows the second
        (["ttI"], [[-1, -1, 0]]),  # an image at the end is nobody's future
        (["ttt"], [[-1, -1, -1]]),
        # rows: numbers go on from row to row, what is seen does not
        (["ItI", "tIt"], [[0, 0, 1], [-1, 2, 2]]),
        (["III", "tII", "Itt"], [[0, 1, 2], [-1, 3, 4], [5, 5, 5]]),
        # a text-only row between rows with images
        (["tIt", "ttt", "ItI"], [[-1, 0, 0], [-1, -1, -1], [1, 1, 2]]),
        # padding on the left is before any image, on the right it is part of the last
        (["ppIt", "tItI"], [[-1, -1, 0, 0], [-1, 1, 1, 2]]),
        (["Itpp", "tItI"], [[0, 0, 0, 0], [-1, 1, 1, 2]]),
    ],
)
def test_a_token_sees_the_image_that_it_follows_most_closely(rows, seen):
    ids = tokens(*rows)
    assert immediate_image(ids, IMAGE, image_offsets(ids, IMAGE)).tolist() == seen


@pytest.mark.parametrize(
    ("row", "segments", "seen"),
    [
        ("ItIt", "0011", [0, 0, 1, 1]),
        ("ItttIt", "001122", [0, 0, -1, -1, 1, 1]),  # text only after an image of another document
        ("IttIt", "00111", [0, 0, -1, 1, 1]),  # text before its own image
        ("IIttt", "00001", [0, 1, 1, 1, -1]),
        ("ttIpp", "00122", [-1, -1, 0, -1, -1]),  # padding is a document of its own
    ],
)
def test_in_a_packed_row_images_of_other_documents_are_not_seen(row, segments, seen):
    ids = tokens(row, row)
    parts = torch.tensor([[int(digit) for digit in segments]] * 2)
    found = immediate_image(ids, IMAGE, image_offsets(ids, IMAGE), parts)
    images = row.count("I")
    assert found.tolist() == [seen, [s if s < 0 else s + images for s in seen]]


@pytest.mark.parametrize(
    ("row", "segments", "seen"),
    [
        ("tIttIt", None, [0, 0, 1, 1, 1, -1]),  # after the last image: none
        ("ttt", None, [-1, -1, -1]),
        ("IIt", None, [0, 1, -1]),
        ("ttIIt", "00111", [-1, -1, 0, 1, -1]),  # the next document's image is not its own
        ("ItItt", "00011", [0, 1, 1, -1, -1]),
    ],
)
def test_looking_ahead_a_token_sees_the_next_image_of_its_document(row, segments, seen):
    ids = tokens(row, row)
    parts = None if segments is None else torch.tensor([[int(digit) for digit in segments]] * 2)
    found = next_image(ids, IMAGE, image_offsets(ids, IMAGE), parts)
    images = row.count("I")
    assert found.tolist() == [seen, [s if s < 0 else s + images for s in seen]]


@pytest.mark.parametrize(
    ("rows", "segments", "ranges"),
    [
        (["tItI"], None, [[None, (0, 0), (0, 0), (0, 1)]]),
        (["Itt", "IIt"], None, [[(0, 0)] * 3, [(1, 1), (1, 2), (1, 2)]]),
        (["ItIt"], "0011", [[(0, 0), (0, 0), (1, 1), (1, 1)]]),
        (["IItIt"], "00011", [[(0, 0), (0, 1), (0, 1), (2, 2), (2, 2)]]),
    ],
)
def test_attending_to_the_previous_images_means_all_of_the_document_so_far(rows, segments, ranges):
    parts = None if segments is None else torch.tensor([[int(digit) for digit in segments]] * len(rows))
    seen, since = sight(tokens(*rows), IMAGE, "previous", parts)
    pairs = [
        [None if last < 0 else (first, last) for first, last in zip(*row, strict=True)]
        for row in zip(since.tolist(), seen.tolist(), strict=True)
    ]
    assert pairs == ranges


def test_tokens_that_look_ahead_see_one_image_also_where_others_see_all():
    ids = tokens("ItIt")
    ahead = torch.tensor([[False, True, False, False]])
    seen, since = sight(ids, IMAGE, "previous", None, ahead)
    assert list(zip(since[0].tolist(), seen[0].tolist(), strict=True)) == [(0, 0), (1, 1), (0, 1), (0, 1)]


def test_positions_restart_with_each_document():
    segments = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 1, 1, -1, -1]])
    expected = [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 0, 1]]
    assert restarting_positions(segments).tolist() == expected


def test_offsets_count_the_images_of_the_rows_before():
    assert image_offsets(tokens("tII", "ttt", "Itt", "III"), IMAGE).tolist() == [0, 2, 2, 3]


def test_offsets_may_start_anywhere():
    """As for a part of a batch whose other rows are elsewhere."""
    ids = tokens("tIt", "ItI")
    assert immediate_image(ids, IMAGE, torch.tensor([4, 9])).tolist() == [[-1, 4, 4], [9, 9, 10]]


def random_sights(seed: int) -> torch.Tensor:
    """Sights as they come out of random ids with more or fewer images."""
    generator = torch.Generator().manual_seed(seed)
    rows, length = seed % 4 + 1, seed % 9 + 1
    is_image = torch.rand(rows, length, generator=generator) < (seed % 3) / 3
    ids = torch.where(is_image, IMAGE, 7)
    return immediate_image(ids, IMAGE, image_offsets(ids, IMAGE))


SIGHTS = [random_sights(seed) for seed in range(24)]
SIGHTS += [
    torch.tensor([[0, 0, 0], [0, 0, 0]]),  # two beams of one row, one image
    torch.tensor([[-1, 0, 1], [-1, 0, 1], [2, 2, 2], [2, 2, 2]]),  # beams of two rows
    torch.tensor([[3], [3], [-1]]),  # one new token of each of three beams
    torch.full((2, 3), -1),
]


@pytest.mark.parametrize("seen", SIGHTS, ids=range(len(SIGHTS)))
def test_every_token_that_sees_an_image_has_one_slot_of_a_run_of_its_own_row_and_image(seen):
    runs = Runs.of(seen)
    length, flat = seen.shape[1], seen.flatten()
    assert runs.source.tolist() == (flat >= 0).nonzero().squeeze(1).tolist()
    assert len(runs.slot.unique()) == len(runs.slot)  # no two results in one slot
    assert runs.token.flatten()[runs.slot].tolist() == runs.source.tolist()
    for image, run in zip(runs.image.tolist(), runs.token.tolist(), strict=True):
        assert {int(flat[token]) for token in run} == {image}  # unused slots too
        assert len({token // length for token in run}) == 1


@pytest.mark.parametrize("seen", SIGHTS, ids=range(len(SIGHTS)))
def test_there_is_one_run_per_row_and_image(seen):
    """So that keys and values are read once for all tokens that look at them."""
    pairs = {(b, image) for b, row in enumerate(seen.tolist()) for image in row if image >= 0}
    runs = Runs.of(seen)
    assert len(runs) == len(pairs)
    assert runs.token.shape[1] <= seen.shape[1]


def test_long_runs_among_short_ones_are_cut_in_pieces():
    """Slots are a few times the tokens at most, though one run has ten times the tokens of the others."""
    counts = [9, 130, 12, 8, 65, 10]
    seen = torch.tensor([[image for image, count in enumerate(counts) for _ in range(count)]])
    runs = Runs.of(seen)
    assert runs.member.shape == (5 + 1 + 3 + 3, PIECE)  # 130 = 4 x 32 + 2, 65 = 2 x 32 + 1
    assert runs.image.tolist() == [0, 1, 1, 1, 1, 1, 2, 3, 4, 4, 4, 5]
    assert runs.filled.sum() == sum(counts) and len(runs.slot.unique()) == sum(counts)
    assert torch.equal(runs.image[runs.slot // PIECE], seen[0])


@pytest.mark.parametrize("counts", [[40, 40, 40], [9, 12, 30], [70], [9, 45]])
def test_runs_of_about_one_length_stay_whole(counts):
    seen = torch.tensor([[image for image, count in enumerate(counts) for _ in range(count)]])
    runs = Runs.of(seen)
    assert len(runs) == len(counts) and runs.in_order


@pytest.mark.parametrize(
    ("seen", "in_order"),
    [([[0, 0, 1], [2, 2, 2]], True), ([[1, 1, 0], [2, 2, 2]], False), ([[-1, 0, 0], [1, -1, -1]], False)],
)
def test_images_that_are_seen_one_after_the_other_are_not_gathered(seen, in_order):
    """Of three images: what each run sees, the same with and without a copy."""
    per_image = torch.randn(3, 2, 4, 8)
    runs = Runs.of(torch.tensor(seen))
    found = runs.gather(per_image)
    assert (found is per_image) == in_order
    assert torch.equal(found, per_image[runs.image])


WIDE = [seen.repeat_interleave(13, dim=1) for seen in SIGHTS]


@pytest.mark.parametrize("seen", [*SIGHTS, *WIDE], ids=range(2 * len(SIGHTS)))
def test_products_are_as_tall_as_in_other_steps_filled_up_with_tokens_that_see_nothing(seen):
    runs = Runs.of(seen)
    count, rows = len(runs.source), runs.rows.tolist()
    assert rows[:count] == runs.source.tolist() and len(set(rows)) == len(rows)
    assert (seen.flatten()[runs.rows[count:]] < 0).all()
    assert len(rows) == min(recurring(count), seen.numel())
    assert runs.places[:count].tolist() == runs.slot.tolist() and len(runs.places) == len(rows)
    assert runs.member.shape[1] == recurring(runs.member.shape[1])


def test_few_sizes_are_common_and_none_is_much_larger(monkeypatch):
    monkeypatch.setattr(runtime, "arithmetic", lambda: "bfloat16")  # whose products are prepared
    assert [recurring(n) for n in range(33)] == list(range(33))
    sizes = [recurring(n) for n in range(256, 513)]
    assert len(set(sizes)) == 17 and sizes == sorted(sizes)
    assert all(n <= size <= n * 17 / 16 for n, size in zip(range(256, 513), sizes, strict=True))


def test_sizes_stay_as_they_are_where_no_product_is_prepared(monkeypatch):
    monkeypatch.setattr(runtime, "arithmetic", lambda: "float32")
    assert [recurring(n) for n in range(1025)] == list(range(1025))

"""Where words look: the maps of the model, laid out picture by picture."""

from __future__ import annotations

import torch

from flamingo.looking import token_maps, words_of
from tests.eval.harness_model import tokenizer as byte_tokenizer
from tests.model.conftest import IMAGE, Build

ASKED, SAID = [IMAGE, 5, 6, IMAGE, 7, 8], [9, 10]


def test_of_all_previous_pictures_each_has_its_share(build: Build, pixels: torch.Tensor) -> None:
    model = build(attend_to="previous")
    maps = token_maps(model, ASKED, SAID, pixels[:2])
    whole = model.attention_maps(torch.tensor([[*ASKED, *SAID]]), pixels[:2])[0, -3:]
    assert maps.shape == (3, 2, 2, 2)
    assert torch.equal(maps.flatten(2), whole) and (maps.flatten(2).sum(-1) > 0).all()
    torch.testing.assert_close(maps.flatten(1).sum(1), torch.ones(3))


def test_the_picture_just_before_has_all_of_it(build: Build, pixels: torch.Tensor) -> None:
    model = build(attend_to="immediate")
    maps = token_maps(model, ASKED, SAID, pixels[:2])
    whole = model.attention_maps(torch.tensor([[*ASKED, *SAID]]), pixels[:2])[0, -3:]
    assert not maps[:, 0].any() and torch.equal(maps[:, 1].flatten(1), whole)


def test_without_pictures_there_are_no_maps(build: Build, pixels: torch.Tensor) -> None:
    model = build()
    assert token_maps(model, [5, 6], SAID, pixels[:0]).shape == (3, 0, 2, 2)


def test_a_character_of_several_tokens_stays_in_its_word() -> None:
    words = byte_tokenizer()
    ids = words(" un été, 夏!", add_special_tokens=False)["input_ids"]
    found = words_of(words, ids)
    assert [word for word, _ in found] == ["un", "été,", "夏!"]
    assert [place for _, places in found for place in places] == list(range(len(ids)))
    broken = [*ids[:3], words("é", add_special_tokens=False)["input_ids"][0], *words(" a}")["input_ids"]]
    assert [word for word, _ in words_of(words, broken)][-2:] == [words_of(words, broken)[-2][0], "a}"]
    assert "\ufffd" in words_of(words, broken)[-2][0]

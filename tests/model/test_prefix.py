"""A prompt that many queries share is computed once, and changes nothing but the time."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from flamingo.attention import attend_plainly
from flamingo.decoder import find_decoder_layers

IMAGE, END = 21, 20
PREFIX = [IMAGE, 5, 6, END, IMAGE, 7, 8, 9, END]
# A picture of its own, two, none, and one after a word.
QUERIES = [[IMAGE, 3, 4], [IMAGE, 5, IMAGE, 6, 7, 8], [11], [3, IMAGE]]
COUNTS = [1, 2, 0, 1]
LMS = {
    "llama": ("llama", {}),
    "gpt2": ("gpt2", {}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3}),
    "mpt": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 4, "use_cache": True}),
    "sliding": (
        "qwen3",
        {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
        },
    ),
}


@pytest.fixture(scope="module", params=LMS)
def seer(build, request):
    family, fields = LMS[request.param]
    return build(family, lm={"initializer_range": 0.1, **fields})  # rounding stays below 1e-5


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    """float[6, 3, 64, 64]: two of the prefix, four of the queries."""
    return torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def padded(rows: list[list[int]]) -> dict:
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_side="left")
    mask = [torch.ones(len(row), dtype=torch.long) for row in rows]
    return {
        "input_ids": ids,
        "attention_mask": pad_sequence(mask, batch_first=True, padding_side="left"),
    }


def whole(pictures, queries=(0, 1, 2, 3)) -> dict:
    """Each row with the prefix of its own."""
    own = torch.split(pictures[2:], COUNTS)
    images = [part for q in queries for part in (pictures[:2], own[q])]
    return {**padded([PREFIX + QUERIES[q] for q in queries]), "pixel_values": torch.cat(images)}


def after(model, pictures, queries=(0, 1, 2, 3)) -> dict:
    """The queries, and the prefix computed before."""
    own = torch.split(pictures[2:], COUNTS)
    return {
        **padded([QUERIES[q] for q in queries]),
        "pixel_values": torch.cat([own[q] for q in queries]),
        "prefix": model.prefix(torch.tensor([PREFIX]), pictures[:2]),
    }


def write(model, given, **options):
    """(what generate returns, the logits of each new token)."""
    made = model.generate(
        **given,
        **{"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "output_logits": True, **options},
        return_dict_in_generate=True,
    )
    return made.sequences.tolist(), torch.stack(made.logits)


def assert_same(model, pictures, queries=(0, 1, 2, 3), **options):
    expected, logits = write(model, whole(pictures, queries), use_cache=False, **options)
    written, found = write(model, after(model, pictures, queries), **options)
    assert written == expected
    torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("queries", [[0], [1], [2], [3], [0, 1, 2, 3]], ids=str)
def test_queries_after_a_prefix_write_what_whole_prompts_write(seer, pictures, queries):
    assert_same(seer, pictures, queries)


def test_beams_after_a_prefix_are_those_of_whole_prompts(seer, pictures):
    assert_same(seer, pictures, num_beams=3)
    assert_same(seer, pictures, num_beams=3, num_return_sequences=2)


@pytest.mark.parametrize("queries", [[1], [2], [0, 1, 2, 3]], ids=str)
def test_it_works_for_models_that_see_all_images_before(build, pictures, queries):
    model = build(attend_to="previous")
    assert_same(model, pictures, queries)
    assert_same(model, pictures, queries, num_beams=2)


def test_a_row_looks_at_the_prefix_until_its_own_picture(build, pictures):
    """The second picture of the prefix matters for a query without one, and the own for one with it."""
    model = build()
    other = pictures.clone()
    other[1] = other[1].flip(-1) * 2
    text, logits = (write(model, after(model, p, [2]), max_new_tokens=1)[1] for p in (pictures, other))
    assert not torch.allclose(text, logits)


def test_only_the_query_is_computed(build, pictures):
    model = build()
    given = after(model, pictures)
    seen: list[int] = []
    layer = find_decoder_layers(model.language_model)[0]
    layer.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    encoded: list[int] = []
    model.vision_encoder.register_forward_hook(lambda _, args, __: encoded.append(len(args[0])))
    write(model, given)
    assert seen == [max(map(len, QUERIES)), 1, 1, 1] and encoded == [4]


def test_a_prefix_is_used_often_and_never_changed(build, pictures):
    model = build()
    given = after(model, pictures)
    before = [(k.clone(), v.clone()) for k, v in given["prefix"].states]
    first = write(model, given)
    write(model, {**given, **padded([[4, 5, 6]]), "pixel_values": None}, num_beams=2)
    again = write(model, given)
    assert first[0] == again[0] and torch.equal(first[1], again[1])
    for pair, old in zip(given["prefix"].states, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(pair, old, strict=True))


def test_a_prefix_may_be_all_there_is(build, pictures):
    model = build()
    prefix = model.prefix(torch.tensor([PREFIX]), pictures[:2])
    none = torch.zeros(2, 0, dtype=torch.long)
    written, _ = write(model, {"input_ids": none, "prefix": prefix})
    expected, _ = write(model, {"input_ids": torch.tensor([PREFIX]), "pixel_values": pictures[:2]})
    assert written == expected * 2


def test_a_prefix_of_text_and_queries_of_text(build, pictures):
    model = build()
    prefix = model.prefix(torch.tensor([[3, 4, 5]]))
    written, _ = write(model, {**padded([[6, 7], [8]]), "prefix": prefix})
    assert written == write(model, padded([[3, 4, 5, 6, 7], [3, 4, 5, 8]]))[0]
    own = {**padded([[6, IMAGE]]), "pixel_values": pictures[:1]}
    expected, _ = write(model, {**padded([[3, 4, 5, 6, IMAGE]]), "pixel_values": pictures[:1]})
    assert write(model, {**own, "prefix": prefix})[0] == expected


def test_samples_and_drafts_from_the_prompt_work_after_a_prefix(build, pictures):
    model = build()
    given = after(model, pictures)
    greedy, _ = write(model, given)
    made = model.generate(
        **given, max_new_tokens=4, do_sample=True, top_k=1, num_return_sequences=2, eos_token_id=None
    )
    assert made.tolist() == [row for row in greedy for _ in range(2)]
    one = after(model, pictures, [1])
    assert write(model, one, prompt_lookup_num_tokens=3)[0] == write(model, one)[0]


def test_mistakes_are_refused(build, pictures):
    model = build()
    with pytest.raises(ValueError, match="a prefix is one row, input_ids has 2"):
        model.prefix(torch.tensor([[3], [4]]))
    with pytest.raises(ValueError, match="1 <image> tokens.* 2 images"):
        model.prefix(torch.tensor([[IMAGE, 3]]), pictures[:2])
    given = after(model, pictures, [0, 2])
    with pytest.raises(ValueError, match="padded on the left"):
        model.generate(**{**given, "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])})
    with pytest.raises(ValueError, match="1 <image> tokens.* 4 images"):
        model.generate(**{**given, "pixel_values": pictures[2:]})


@pytest.mark.skipif(torch.cuda.is_available(), reason="attends plainly on a CPU only")
def test_it_works_where_the_lm_attends_plainly(build, pictures):
    """More keys than queries: not to be taken for a row of packed documents."""
    model = build(lm={"num_key_value_heads": 2})
    attend_plainly(model.language_model)
    assert_same(model, pictures)
    assert_same(model, pictures, [1])

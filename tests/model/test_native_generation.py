"""Every mode of transformers' `generate`, and of loading, on models that see.

The reference is always the plainest way: one row at a time, all tokens anew for each new one.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from flamingo import FlamingoForConditionalGeneration

IMAGE = 21
ROWS = [[9, 10, IMAGE, 11], [IMAGE, 5, 6, IMAGE, 7, 8, 9], [3, 4, 5]]  # 1, 2 and no pictures
NEW = 5
LMS = {
    "llama": {},  # rotary positions
    "gpt2": {},  # learned positions
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 4, "use_cache": True},  # distances (ALiBi)
}
WHICH = pytest.mark.parametrize("seer", LMS, indirect=True)


@pytest.fixture(scope="module")
def seer(build, request):
    """A model of the family, shared: nothing here changes it."""
    family = getattr(request, "param", "llama")
    return build(family, lm=LMS[family])


@pytest.fixture(scope="module")
def batch(pixels) -> dict:
    """ROWS, padded on the left."""
    ids = pad_sequence([torch.tensor(row) for row in ROWS], batch_first=True, padding_side="left")
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "pixel_values": pixels}


def alone(pixels, row: int) -> dict:
    """One row of ROWS, without padding."""
    start = sum(r.count(IMAGE) for r in ROWS[:row])
    ids = torch.tensor([ROWS[row]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels[start : start + ROWS[row].count(IMAGE)],
    }


def write(model, given, **options) -> list[list[int]]:
    """The new tokens, NEW of them unless the options say otherwise."""
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, **options}
    return model.generate(**given, **options)[:, given["input_ids"].shape[1] :].tolist()


@torch.no_grad()
def next_logprobs(model, pixels, row: int, written: list[int]) -> torch.Tensor:
    """float[V]: of the token after a row and what was written, all of it computed anew."""
    given = alone(pixels, row)
    ids = torch.tensor([ROWS[row] + written])
    logits = model(input_ids=ids, pixel_values=given["pixel_values"], use_cache=False).logits[0, -1]
    logprobs = logits.log_softmax(dim=-1)
    logprobs[IMAGE] = -torch.inf
    return logprobs


def greedy(model, pixels, row: int) -> list[int]:
    written: list[int] = []
    for _ in range(NEW):
        written.append(int(next_logprobs(model, pixels, row, written).argmax()))
    return written


def beams(model, pixels, row: int, width: int) -> list[int]:
    found = [(0.0, [])]
    for _ in range(NEW):
        longer = [
            (score + float(more), [*written, token])
            for score, written in found
            for token, more in enumerate(next_logprobs(model, pixels, row, written))
        ]
        found = sorted(longer, reverse=True)[:width]
    return found[0][1]


# -- modes -------------------------------------------------------------------------------


@WHICH
def test_a_ragged_batch_writes_what_each_row_writes_alone_and_without_a_cache(seer, batch, pixels):
    expected = [greedy(seer, pixels, row) for row in range(3)]
    assert write(seer, batch) == expected
    assert [write(seer, alone(pixels, row))[0] for row in range(3)] == expected
    assert write(seer, batch, use_cache=False) == expected


@WHICH
def test_beams_of_a_ragged_batch_are_those_found_by_hand(seer, batch, pixels):
    expected = [beams(seer, pixels, row, 3) for row in range(3)]
    assert write(seer, batch, num_beams=3) == expected
    several = write(seer, batch, num_beams=3, num_return_sequences=2)
    assert several[::2] == expected and len(several) == 6
    assert all(a != b for a, b in zip(several[::2], several[1::2], strict=True))


@WHICH
def test_the_static_cache_writes_the_same(seer, batch):
    assert write(seer, batch, cache_implementation="static") == write(seer, batch)
    beams = {"num_beams": 3}
    assert write(seer, batch, cache_implementation="static", **beams) == write(seer, batch, **beams)


@WHICH
def test_prompt_lookup_writes_the_same(seer, pixels):
    """Assisted decoding takes one row; drafts come from the prompt, so the prompt repeats itself."""
    for row in range(3):
        given = alone(pixels, row)
        expected = write(seer, given, max_new_tokens=12)
        assert write(seer, given, max_new_tokens=12, prompt_lookup_num_tokens=3) == expected
        repeated = torch.tensor([ROWS[row] + expected[0] + ROWS[row][-1:]])
        given |= {"input_ids": repeated, "attention_mask": torch.ones_like(repeated)}
        assert write(seer, given, prompt_lookup_num_tokens=3) == write(seer, given)


@WHICH
def test_sampling_is_repeatable_and_follows_the_seed(seer, batch):
    def sample(seed: int, **options):
        torch.manual_seed(seed)
        return write(seer, batch, do_sample=True, top_k=0, **options)

    assert sample(0) == sample(0) != sample(1)
    several = sample(0, num_return_sequences=3)
    assert len(several) == 9 and not any(IMAGE in row for row in several)
    assert any(row != several[0] for row in several[1:3])
    assert sample(0, temperature=1e-4) == write(seer, batch)


def test_samples_of_a_row_look_at_its_own_picture(seer, pixels, batch):
    """With nothing left to chance, each of the samples is the row's greedy text."""
    several = write(seer, batch, do_sample=True, top_k=1, num_return_sequences=2)
    assert several == [row for row in write(seer, batch) for _ in range(2)]


@WHICH
def test_logits_with_the_cache_equal_those_without(seer, batch):
    options = {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": NEW}
    cached, anew = (
        seer.generate(**batch, **options, eos_token_id=None, do_sample=False, use_cache=use)
        for use in (True, False)
    )
    assert torch.equal(cached.sequences, anew.sequences)
    for one, other in zip(cached.logits, anew.logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_attending_to_all_images_works_in_all_modes(build, batch, pixels):
    model = build(attend_to="previous")
    expected = [greedy(model, pixels, row) for row in range(3)]
    assert write(model, batch) == expected == write(model, batch, cache_implementation="static")
    assert write(model, batch, num_beams=3) == [beams(model, pixels, row, 3) for row in range(3)]
    assert write(model, alone(pixels, 1), prompt_lookup_num_tokens=3) == expected[1:2]


# -- loading -----------------------------------------------------------------------------


def test_sharded_weights_come_back(seer, batch, tmp_path):
    seer.save_pretrained(tmp_path, max_shard_size="200KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    back = FlamingoForConditionalGeneration.from_pretrained(tmp_path)
    assert all(torch.equal(v, back.state_dict()[name]) for name, v in seer.state_dict().items())
    assert write(back, batch) == write(seer, batch)


@pytest.mark.parametrize("where", ["auto", "cpu"])
def test_a_device_map_loads(seer, batch, tmp_path, where):
    pytest.importorskip("accelerate")
    seer.save_pretrained(tmp_path)
    back = FlamingoForConditionalGeneration.from_pretrained(tmp_path, device_map=where)
    batch = {name: value.to(back.device) for name, value in batch.items()}
    assert write(back, batch) == write(seer, batch)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_attention_asked_for_reaches_the_lm_and_changes_no_logits(build, batch, tmp_path, family):
    build(family).save_pretrained(tmp_path)
    logits = []
    for kind in ("eager", "sdpa"):
        model = FlamingoForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=kind)
        assert model.language_model.config._attn_implementation == kind
        with torch.no_grad():
            logits.append(model(**batch).logits[batch["attention_mask"] > 0])
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles flex attention with g++ on a CPU")
def test_flex_attention_changes_no_logits(build, batch, tmp_path):
    build("llama", lm={"hidden_size": 64}).save_pretrained(tmp_path)
    logits = []
    for kind in ("sdpa", "flex_attention"):
        model = FlamingoForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=kind)
        assert model.language_model.config._attn_implementation == kind
        with torch.no_grad():
            logits.append(model(**batch).logits[batch["attention_mask"] > 0])
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


def test_an_attention_that_is_not_there_is_an_error(seer, tmp_path):
    seer.save_pretrained(tmp_path)
    with pytest.raises((ImportError, ValueError), match="[Ff]lash"):
        FlamingoForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="flash_attention_2")
    with pytest.raises(ValueError, match="best"):
        FlamingoForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="best")

"""Any frozen causal LM can be conditioned from outside, and stays itself."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from flamingo.decoder import find_decoder_layers

FAMILIES: dict[str, dict] = {
    "llama": {"num_key_value_heads": 2},
    "gpt2": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3},
    "gpt_neox": {},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 4, "max_seq_len": 64},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8},
    "falcon": {},
    "phi": {},
    "gptj": {"rotary_dim": 4},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 4},
    "qwen2": {"num_key_value_heads": 2},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8},
    "smollm3": {"num_key_value_heads": 2},
    "olmo2": {"num_key_value_heads": 2},
}
CASES = [
    pytest.param(family, {**fields, "tie_word_embeddings": tied}, id=f"{family}-{name}")
    for family, fields in FAMILIES.items()
    for tied, name in ((False, "untied"), (True, "tied"))
]
# OPT-350m's embeddings are narrower than its layers.
CASES += [
    pytest.param("opt", {"ffn_dim": 48, "word_embed_proj_dim": 16, "init_std": 0.3}, id="opt-projected")
]


@pytest.mark.parametrize(("family", "lm"), CASES)
def test_every_trained_parameter_learns_and_the_lm_does_not(build, ids, pixels, family, lm):
    model = build(family, lm=lm)
    loss = model(input_ids=ids, pixel_values=pixels, labels=ids).loss
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        if name.startswith(("language_model.", "vision_encoder.")):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.any(), name


@pytest.mark.parametrize(("family", "lm"), CASES)
def test_the_lm_keeps_its_weight_names_and_works_as_before_on_its_own(build, ids, pixels, family, lm):
    model = build(family, lm=lm)
    conditioned = model.language_model
    alone = AutoModelForCausalLM.from_config(copy.deepcopy(conditioned.config)).eval()
    assert type(conditioned) is type(alone)
    assert list(conditioned.state_dict()) == list(alone.state_dict())
    alone.load_state_dict(conditioned.state_dict())
    words = ids.clamp_max(model.config.first_added_token_id - 1)
    with torch.no_grad():
        expected = alone(words).logits
        assert torch.equal(conditioned(words).logits, expected)
        model(input_ids=ids, pixel_values=pixels)
        assert torch.equal(conditioned(words).logits, expected)  # nothing is left behind


@pytest.mark.parametrize(("family", "lm"), CASES)
def test_shut_gates_leave_the_lms_logits_bitwise_unchanged(build, ids, pixels, family, lm):
    model = build(family, lm=lm, gate_init=0.0)
    words = model.config.first_added_token_id
    # Words of the LM only, told from outside which image they see.
    text, sees = ids.clamp_max(words - 1), torch.tensor([[0] * 7, [-1, -1, *[2] * 5]])
    with torch.no_grad():
        seen = model(input_ids=text, media=model.media(pixel_values=pixels), seen=sees).logits
        alone = model.language_model(text).logits
    assert seen.shape[-1] == words + 2  # the unused rows of the table are no words
    assert torch.equal(seen[..., :words], alone[..., :words])


@pytest.mark.parametrize(("family", "lm"), CASES)
def test_open_gates_let_the_images_in(build, ids, pixels, family, lm):
    model = build(family, lm=lm)
    with torch.no_grad():
        a = model(input_ids=ids, pixel_values=pixels).logits
        b = model(input_ids=ids, pixel_values=pixels.flip(0)).logits
    before = torch.tensor([[False] * 7, [True, True, *[False] * 5]])  # ids[1] has text first
    differ = (a != b).any(dim=-1)
    assert differ[0, 0] and differ[1, 2]
    assert not differ[before].any()


@pytest.mark.parametrize(("family", "lm"), CASES)
def test_generation_with_the_cache_writes_what_repeated_full_passes_write(build, ids, pixels, family, lm):
    model = build(family, lm=lm)
    written = ids
    with torch.no_grad():
        for _ in range(5):
            logits = model(input_ids=written, pixel_values=pixels, use_cache=False).logits[:, -1]
            logits[:, model.config.image_token_id] = -torch.inf
            written = torch.cat((written, logits.argmax(dim=-1, keepdim=True)), dim=1)
    cached = model.generate(
        ids,
        pixel_values=pixels,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=None,
    )
    assert cached.tolist() == written.tolist()


class Layers(nn.Module):
    """A module that says how many decoder layers it has, with the lists that a test gives it."""

    def __init__(self, expected: int, **lists: nn.Module):
        super().__init__()
        text = SimpleNamespace(num_hidden_layers=expected)
        self.config = SimpleNamespace(get_text_config=lambda: text)
        for name, module in lists.items():
            setattr(self, name, module)


def some(count: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(1, 1) for _ in range(count))


def test_the_layers_are_found_among_lists_of_other_lengths_and_lists_inside_layers():
    experts = nn.ModuleList(nn.ModuleDict({"experts": some(3)}) for _ in range(3))
    assert find_decoder_layers(Layers(3, heads=some(2), blocks=experts)) is experts


@pytest.mark.parametrize(
    ("lists", "found"),
    [
        ({}, "none"),
        ({"blocks": some(4)}, "none"),
        ({"blocks": nn.Sequential(*some(3))}, "none"),
        ({"encoder": some(3), "decoder": some(3)}, "'encoder', 'decoder'"),
    ],
)
def test_an_lm_whose_layers_cannot_be_found_is_refused_by_name(lists, found):
    with pytest.raises(ValueError, match=r"Layers.*num_hidden_layers=3") as error:
        find_decoder_layers(Layers(3, **lists))
    assert found in str(error.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_added_token_with_the_row_of_a_word_reads_as_that_word(build, family):
    """Also where the LM scales its embeddings."""
    model = build(family, lm=FAMILIES[family])
    end = model.config.end_of_chunk_token_id
    with torch.no_grad():
        model.added_tokens.input[0] = model.get_input_embeddings().weight[5]
        added = model(input_ids=torch.tensor([[3, end, 4]])).logits
        word = model(input_ids=torch.tensor([[3, 5, 4]])).logits
    assert torch.equal(added, word)


@pytest.mark.parametrize(
    ("architecture", "positions"),
    [
        ({"cross_attention_every": 1}, [0, 1, 2, 3]),
        ({"cross_attention_every": 2}, [0, 2]),
        ({"cross_attention_every": 2, "cross_attention_offset": 1}, [1, 3]),
        ({"cross_attention_layers": [3, 0]}, [0, 3]),
    ],
)
def test_blocks_stand_before_the_layers_that_the_config_names(build, ids, pixels, architecture, positions):
    model = build(**architecture)
    order: list[str] = []
    watched = {f"layer {i}": m for i, m in enumerate(find_decoder_layers(model.language_model))}
    watched |= {f"block {p}": m for p, m in zip(positions, model.gated_blocks, strict=True)}
    for name, module in watched.items():
        # The blocks run in a hook before the layer: a layer is noted when it is done.
        module.register_forward_hook(lambda *_, name=name: order.append(name))
    model(input_ids=ids, pixel_values=pixels)
    expected = [name for i in range(4) for name in ([f"block {i}"] * (i in positions) + [f"layer {i}"])]
    assert order == expected


@pytest.mark.parametrize(
    "wrong",
    [
        {"cross_attention_layers": [4]},
        {"cross_attention_layers": [-1]},
        {"cross_attention_layers": [1, 1]},
        {"cross_attention_layers": []},
        {"cross_attention_every": 9, "cross_attention_offset": 5},
    ],
)
def test_block_positions_that_the_lm_does_not_have_are_refused(build, wrong):
    with pytest.raises(ValueError, match=r"cross_attention_layers=.*0\.\.3"):
        build(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"resampler_depth": 0},
        {"resampler_latents": 0},
        {"cross_attention_every": 0},
        {"cross_attention_heads": -1},
        {"cross_attention_offset": 4, "cross_attention_every": 4},
    ],
)
def test_sizes_that_no_architecture_can_have_are_refused_by_name(build, wrong):
    name = next(iter(wrong))
    with pytest.raises(ValueError, match=f"{name}={wrong[name]}"):
        build(**wrong)


def test_a_frozen_lm_in_half_precision_is_conditioned_by_blocks_in_full(build, ids, pixels):
    model = build()
    model.language_model.bfloat16()
    out = model(input_ids=ids, pixel_values=pixels, labels=ids)
    out.loss.backward()
    assert out.loss.isfinite() and out.loss.dtype == torch.float32
    assert model.gated_blocks[0].attn.to_q.weight.grad.dtype == torch.float32

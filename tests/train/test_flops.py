"""Model FLOPs by the formula against torch's own counter, there and back."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from flamingo.config import FlamingoConfig, FlamingoVisionConfig
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.train.config import LoraConfig
from flamingo.train.flops import measured_peak, step_flops
from flamingo.train.parts import add_adapters
from tests.train import ways
from tests.train.ranks import in_ranks

WORDS, ROWS, LENGTH, TARGETS = 300, 2, 40, 24
VISION = {
    "cnn": FlamingoVisionConfig(
        source="timm", name="test_efficientnet", image_size=64, width=256, grid=[2, 2]
    ),
    "vit": FlamingoVisionConfig(
        source="timm", name="test_vit", image_size=160, width=64, grid=[10, 10], options={}
    ),
}
LANGUAGE = {
    "llama": {"num_hidden_layers": 4, "intermediate_size": 160, "num_key_value_heads": 2},
    "gpt2": {"n_layer": 4, "n_inner": 192},
    "gpt_neox": {"num_hidden_layers": 4, "intermediate_size": 192},
}


def config(language: str = "llama", vision: str = "cnn", **fields) -> FlamingoConfig:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": WORDS, **LANGUAGE[language]}
    if language == "gpt2":
        sizes = {"n_embd": 64, "n_head": 4, "vocab_size": WORDS, **LANGUAGE[language]}
    return FlamingoConfig(
        text_config=AutoConfig.for_model(language, attn_implementation="eager", **sizes),
        vision_config=VISION[vision],
        first_added_token_id=WORDS,
        end_of_chunk_token_id=WORDS,
        image_token_id=WORDS + 1,
        **{
            "resampler_depth": 2,
            "resampler_width": 96,
            "resampler_heads": 3,
            "resampler_head_dim": 16,
            "resampler_latents": 5,
            "cross_attention_every": 2,
            "cross_attention_heads": 3,
            "cross_attention_head_dim": 16,
            **fields,
        },
    )


def counted(model: FlamingoForConditionalGeneration) -> int:
    """FLOPs of a step by torch's counter: every token sees its row's picture, 24 targets a row."""
    size = model.config.vision_config.image_size  # type: ignore[union-attr]
    ids = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) % WORDS
    ids[:, 0] = WORDS + 1
    labels = ids.masked_fill(torch.arange(LENGTH) < LENGTH - TARGETS, -100)
    # Plain products: torch's counter knows no backward pass of the CPU's fused attention.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(input_ids=ids, pixel_values=torch.randn(ROWS, 3, size, size), labels=labels).loss.backward()
    return counter.get_total_flops()


def formula(model: FlamingoForConditionalGeneration, **more) -> float:
    held = {"tokens": ROWS * LENGTH, "targets": ROWS * TARGETS, "images": ROWS, "pairs": ROWS * LENGTH**2}
    return step_flops(model, **{**held, **more})


@pytest.mark.parametrize("language", LANGUAGE)
@pytest.mark.parametrize("vision", VISION)
def test_the_formula_is_the_count_of_forward_and_backward(language, vision):
    model = FlamingoForConditionalGeneration(config(language, vision)).train()
    assert formula(model) == pytest.approx(counted(model), rel=0.01)


@pytest.mark.parametrize(
    "fields",
    [
        {"cross_attention_ff": "swiglu", "cross_attention_every": 1},
        {"resampler_width": None},  # no projection of the grid
        {"cross_attention_layers": [3], "resampler_depth": 1},
    ],
)
def test_the_formula_follows_the_architecture(fields):
    model = FlamingoForConditionalGeneration(config(**fields)).train()
    assert formula(model) == pytest.approx(counted(model), rel=0.01)


def test_layers_below_the_first_block_have_no_backward_pass_while_the_added_rows_are_frozen():
    model = FlamingoForConditionalGeneration(config(cross_attention_layers=[3])).train()
    with_rows = formula(model)
    model.added_tokens.input.requires_grad_(False)
    assert formula(model) < 0.9 * with_rows
    assert formula(model) == pytest.approx(counted(model), rel=0.01)


@pytest.mark.parametrize("part", ["language_model", "vision_encoder", "embeddings"])
def test_what_is_unfrozen_counts_as_trained(part):
    model = FlamingoForConditionalGeneration(config(vision="vit")).train()
    frozen = formula(model)
    model.unfreeze(part)
    model.train()
    assert formula(model) > frozen
    # The encoder's first layer wants no gradient of the picture, which the formula does not know, and
    # torch's attention, where it is taken apart, counts one product less.
    close = 0.05 if part == "vision_encoder" else 0.01
    assert formula(model) == pytest.approx(counted(model), rel=close)


def test_adapters_are_counted():
    model = FlamingoForConditionalGeneration(config()).train()
    without = formula(model)
    add_adapters(model, LoraConfig(rank=8))  # type: ignore[call-arg]
    assert formula(model) > 1.02 * without
    assert formula(model) == pytest.approx(counted(model), rel=0.01)


@pytest.mark.parametrize("language", LANGUAGE)
@pytest.mark.parametrize("connector", ["linear", "mlp", "perceiver"])
def test_vectors_in_the_input_are_counted_as_tokens(language, connector):
    """With the pairs that the LM's attention compares them in."""
    fields = {"fusion": "prefix", "connector": connector}
    model = FlamingoForConditionalGeneration(config(language, "vit", **fields)).train()
    read = LENGTH + model.image_tokens - 1
    assert read > LENGTH
    assert formula(model, pairs=ROWS * read**2) == pytest.approx(counted(model), rel=0.01)


@pytest.mark.parametrize("fusion", ["cross_attention", "prefix"])
def test_recomputed_layers_are_counted_once_more(fusion):
    model = FlamingoForConditionalGeneration(config(fusion=fusion)).train()
    model.gradient_checkpointing_enable()
    # torch stops the second pass of a layer at the last tensor that is wanted.
    pairs = ROWS * (LENGTH + model.image_tokens - 1) ** 2
    assert 1.0 <= formula(model, pairs=pairs, recomputed=True) / counted(model) < 1.05


def test_what_a_step_holds_decides():
    model = FlamingoForConditionalGeneration(config("llama", "vit"))
    whole = formula(model)
    assert formula(model, pictures=0) == pytest.approx(
        whole
        - ROWS * step_flops(model, tokens=0, targets=0, images=1, places=0)
        + ROWS * step_flops(model, tokens=0, targets=0, images=1, places=0, pictures=0)
    )
    assert formula(model, targets=0) < whole
    assert formula(model, looks=0) < whole
    assert step_flops(model, tokens=0, targets=0, images=0) == 0


def test_of_experts_those_count_that_a_token_is_sent_to():
    """In tensors of all experts: a quarter of them works for a token, in 3 matrices each."""
    dense, sparse = (
        FlamingoForConditionalGeneration(
            FlamingoConfig(
                **{
                    **config().to_dict(),
                    "text_config": {
                        "model_type": "qwen3_moe", "hidden_size": 64, "num_hidden_layers": 4, "head_dim": 16,
                        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": WORDS,
                        "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": chosen,
                    },
                }
            )
        )
        for chosen in (8, 2)
    )  # fmt: skip
    without = {"targets": 0, "images": 0, "pairs": 0}
    saved = 4 * 6 * (3 * 2 * 64 * 32) * 2 * ROWS * LENGTH  # layers, experts, matrices, there and back
    assert formula(dense, **without) - formula(sparse, **without) == pytest.approx(saved)


def test_the_measured_peak_is_that_of_this_machine():
    peak = measured_peak("cpu", torch.float32)
    assert 1e8 < peak < 1e16
    assert measured_peak("cpu", torch.float32) == peak  # measured once


def test_weights_in_pieces_are_counted_as_whole_ones(tmp_path):
    """ZeRO-3, where all of the LM is trained, or adapters in it are."""
    settings = [{"unfreeze": [{"part": "language_model"}]}, {"lora": {"rank": 4}}, {}]
    for whole, in_pieces in in_ranks(2, tmp_path, ways.flops_of_all, settings)[0]:
        assert in_pieces == whole

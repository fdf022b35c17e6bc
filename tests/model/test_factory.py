"""Names -> model and processor, from local folders."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from flamingo.checkpoints.trainables import from_trainables
from flamingo.cli import app
from flamingo.factory import create
from flamingo.modeling import FlamingoForConditionalGeneration

SMALL = {
    "resampler_depth": 1,
    "resampler_width": 16,
    "resampler_heads": 2,
    "resampler_head_dim": 8,
    "resampler_latents": 3,
    "cross_attention_every": 2,
    "cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
}


@pytest.fixture
def language(tmp_path, tokenizer) -> str:
    torch.manual_seed(2)
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=24,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    return str(tmp_path / "lm")


@pytest.fixture
def encoder(tmp_path) -> str:
    torch.manual_seed(3)
    (tmp_path / "encoder").mkdir()
    weights = timm.create_model("test_efficientnet").state_dict()
    save_file(weights, tmp_path / "encoder" / "model.safetensors")
    (tmp_path / "encoder" / "config.json").write_text(json.dumps({"architecture": "test_efficientnet"}))
    return f"timm:{tmp_path / 'encoder'}"


def test_the_frozen_parts_have_the_weights_of_the_folders(language, encoder):
    model, _ = create(vision=encoder, language=language, **SMALL)
    lm = AutoModelForCausalLM.from_pretrained(language).state_dict()
    loaded = model.language_model.state_dict()
    assert list(loaded) == list(lm)
    assert all(torch.equal(loaded[name], lm[name]) for name in lm)
    torch.manual_seed(3)
    timm_model = timm.create_model("test_efficientnet").state_dict()
    for name, value in model.vision_encoder.model.state_dict().items():
        assert torch.equal(value, timm_model[name]), name


def test_added_tokens_have_the_ids_after_the_tokenizers_own(language, encoder):
    model, processor = create(vision=encoder, language=language, **SMALL)
    config, tokenizer = model.config, processor.tokenizer
    assert config.first_added_token_id == 20
    assert tokenizer.convert_tokens_to_ids("<|endofchunk|>") == config.end_of_chunk_token_id == 20
    assert tokenizer.convert_tokens_to_ids("<image>") == config.image_token_id == 21
    assert len(tokenizer) == 22


def test_model_and_processor_fit_together_and_write(language, encoder):
    model, processor = create(vision=encoder, language=language, **SMALL)
    size = model.config.vision_config.image_size
    assert processor.image_processor.transform.size == size
    batch = processor(text=["a b", "c"])
    out = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert out.shape[0] == 2 and model.generation_config.pad_token_id == 0
    assert model.generation_config.eos_token_id == 2


def test_a_new_flamingo_is_the_untouched_lm(language, encoder):
    """Gates start shut."""
    model, _ = create(vision=encoder, language=language, **SMALL)
    lm = AutoModelForCausalLM.from_pretrained(language)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        seen = torch.zeros_like(ids)
        media = model.media(pixel_values=torch.randn(1, 3, 160, 160))
        out = model.eval()(input_ids=ids, media=media, seen=seen).logits
        assert torch.equal(out[..., :20], lm(ids).logits[..., :20])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_frozen_weights_have_the_asked_dtype_and_trained_ones_are_float32(language, encoder, dtype):
    model, _ = create(vision=encoder, language=language, frozen_dtype=dtype, **SMALL)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else dtype), name


def test_the_lm_in_half_precision_is_as_its_library_loads_it(language, encoder):
    """Rotary frequencies stay float32: rounded, far tokens are turned by another angle."""
    model, _ = create(vision=encoder, language=language, frozen_dtype=torch.bfloat16, **SMALL)
    lm = AutoModelForCausalLM.from_pretrained(language, dtype=torch.bfloat16)
    for (name, buffer), (_, expected) in zip(
        model.language_model.named_buffers(), lm.named_buffers(), strict=True
    ):
        assert buffer.dtype == expected.dtype and torch.equal(buffer, expected), name
    ids = torch.arange(3, 20).repeat(4)[None]
    with torch.no_grad():
        assert torch.equal(model.language_model(ids).logits, lm(ids).logits)


def test_a_seed_fixes_the_new_parts_and_nothing_else(language, encoder):
    def parts(seed: int):
        model, _ = create(vision=encoder, language=language, seed=seed, **SMALL)
        return model.state_dict()

    first, same, other = parts(0), parts(0), parts(1)
    assert all(torch.equal(value, same[name]) for name, value in first.items())
    for part in ("resampler.latents", "gated_blocks.0.attn.to_q.weight", "added_tokens.input"):
        assert not torch.equal(first[part], other[part])
    for name in first:
        if name.startswith(("language_model.", "vision_encoder.")):
            assert torch.equal(first[name], other[name])


def test_added_tokens_start_near_the_mean_of_the_tables_and_apart(language, encoder):
    model, _ = create(vision=encoder, language=language, initializer_range=0.01, **SMALL)
    tables = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    for rows, table in zip((model.added_tokens.input, model.added_tokens.output), tables, strict=True):
        assert (rows - table.mean(dim=0)).abs().max() < 0.05
        assert not torch.equal(rows[0], rows[1])


def test_architecture_fields_reach_the_model(language, encoder):
    model, _ = create(
        vision=encoder, language=language, **{**SMALL, "cross_attention_every": 1}, gate_init=0.5
    )
    assert len(model.gated_blocks) == 2
    assert {block.attn_gate.item() for block in model.gated_blocks} == {0.5}


def test_an_unknown_architecture_field_names_the_nearest_or_the_known_ones(language, encoder):
    with pytest.raises(ValueError, match=r"no resampler_widht; did you mean 'resampler_width'\?$"):
        create(vision=encoder, language=language, resampler_widht=16)
    with pytest.raises(ValueError, match="no breadth; known: .*resampler_width"):
        create(vision=encoder, language=language, breadth=16)


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ("tim:resnet18", "'tim'.*timm"),
        ("timm", "source:name"),
        ("timm:", "source:name"),
        ("timm:no_such_net", "no_such_net"),
    ],
)
def test_a_vision_encoder_that_is_not_there_is_named(language, vision, message):
    with pytest.raises(ValueError, match=message):
        create(vision=vision, language=language)


def test_a_language_model_that_is_not_there_is_named(encoder, tmp_path):
    with pytest.raises(ValueError, match="language='.*no_such_lm': no tokenizer in a folder of this name"):
        create(vision=encoder, language=str(tmp_path / "no_such_lm"))
    with pytest.raises(ValueError, match="language='data/models/no_such_lm': no tokenizer in a folder"):
        create(vision=encoder, language="data/models/no_such_lm")  # transformers speaks of a repo id


def test_a_tokenizer_that_has_the_added_tokens_already_is_refused(language, encoder, tokenizer):
    """Their rows would be in the frozen tables."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(language)
    with pytest.raises(ValueError, match="<image>"):
        create(vision=encoder, language=language, **SMALL)


def run(*arguments: str):
    return CliRunner().invoke(app, [*arguments])


def test_the_command_assembles_a_folder_that_loads_and_whose_trained_part_can_be_exported(
    language, encoder, tmp_path
):
    out, weights = tmp_path / "made", tmp_path / "trained.safetensors"
    fields = [f"{name}={value}" for name, value in SMALL.items()]
    backbones = ["--vision", encoder, "--language", language]
    made = run("create", str(out), *fields, *backbones, "--dtype", "float32")
    assert made.exit_code == 0 and "blocks at [0]" in made.output
    model = FlamingoForConditionalGeneration.from_pretrained(out)
    assert model.config.resampler_latents == 3
    assert run("export", str(out), str(weights)).exit_code == 0
    again, processor = from_trainables(weights, vision=encoder, language=language)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert processor.image_token_id == model.config.image_token_id
    assert "is there already" in run("create", str(out), *backbones).output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["resampler_depth"], "write key=value"),
        (["resampler_deepness=3"], "no resampler_deepness; did you mean 'resampler_depth'?"),
        (["x=3"], "FlamingoConfig has no x; known: added_tokens"),
        (["--dtype", "float8"], "choose auto, float32 or bfloat16"),
    ],
)
def test_the_command_refuses_what_it_does_not_know(language, encoder, tmp_path, arguments, words):
    done = run("create", str(tmp_path / "x"), *arguments, "--vision", encoder, "--language", language)
    assert done.exit_code == 1 and words in done.output
    assert not (tmp_path / "x").exists()

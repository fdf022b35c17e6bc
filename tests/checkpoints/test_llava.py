"""Converted LLaVA-1.5 models against transformers' own, with random weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from typer.testing import CliRunner

from flamingo.checkpoints.llava import convert
from flamingo.cli import app
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.processing import FlamingoProcessor

WORDS, IMAGE, PLACES = 20, 20, 4
SIZES: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VARIANTS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "mistral": lambda: MistralConfig(**SIZES, head_dim=12),
    "tied": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
}


@pytest.fixture(scope="module")
def original(tmp_path_factory, shake, word_tokenizer) -> Callable[[str], Path]:
    """original("llama"): the folder of a LLaVA with random weights."""
    made: dict[str, Path] = {}

    def make(variant: str) -> Path:
        if variant not in made:
            tower = CLIPVisionConfig(
                hidden_size=32,
                intermediate_size=40,
                num_hidden_layers=3,
                num_attention_heads=4,
                image_size=16,
                patch_size=8,
            )
            config = LlavaConfig(
                vision_config=tower,
                text_config=VARIANTS[variant](),
                image_token_index=IMAGE,
                image_seq_length=PLACES,
            )
            model = LlavaForConditionalGeneration(config)
            shake(model)
            folder = tmp_path_factory.mktemp(variant)
            model.save_pretrained(folder)
            word_tokenizer(("<image>", "<extra>")).save_pretrained(folder)
            CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(folder)
            made[variant] = folder
        return made[variant]

    return make


def long(rows: list[list[int]]) -> torch.Tensor:
    """As LLaVA's own processor writes it: an <image> for each place of the grid; padded on the left."""
    rows = [[i for token in row for i in [token] * (PLACES if token == IMAGE else 1)] for row in rows]
    most = max(map(len, rows))
    return torch.tensor([[0] * (most - len(row)) + row for row in rows])


def models(folder: Path, out: Path) -> tuple[Any, Any]:
    convert(folder, out)
    theirs = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    return FlamingoForConditionalGeneration.from_pretrained(out).eval(), theirs


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_converted_model_makes_the_same_logits(variant: str, original, tmp_path: Path) -> None:
    ours, theirs = models(original(variant), tmp_path / "model")
    rows = [[1, IMAGE, 3, 4, IMAGE, 5], [1, 6, 7, IMAGE, 8, 9]]
    short = torch.tensor(rows)
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    ids = long(rows)
    mask = (ids != 0).long()
    with torch.no_grad():
        wanted = theirs(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
        found = ours(short, pixel_values=pixels).logits
        blind = ours(short, pixel_values=0 * pixels).logits
    last = ours.expand(short).last
    for row in range(2):
        torch.testing.assert_close(found[row], wanted[row, last[row], :22], atol=1e-5, rtol=1e-5)
    assert (found - blind).abs().max() > 0.01


def test_a_converted_model_says_the_same(original, tmp_path: Path) -> None:
    ours, theirs = models(original("llama"), tmp_path / "model")
    row, pixels = [1, IMAGE, 3, 4], torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    options: Any = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [0, 20, 21, 22, 23]}
    wanted = theirs.generate(input_ids=long([row]), pixel_values=pixels, **options)
    found = ours.generate(torch.tensor([row]), pixel_values=pixels, **{**options, "suppress_tokens": [0, 21]})
    assert found[0, 4:].tolist() == wanted[0, 4 + PLACES - 1 :].tolist()


def test_the_processor_makes_the_same_pixels_of_a_square(original, tmp_path: Path) -> None:
    folder = original("llama")
    result = CliRunner().invoke(app, ["convert", "llava", str(folder), "--out", str(tmp_path / "model")])
    assert result.exit_code == 0, result.output
    assert "</s> stands for <|endofchunk|>" in result.output
    processor: Any = FlamingoProcessor.from_pretrained(tmp_path / "model")
    picture = Image.effect_noise((40, 40), 80).convert("RGB")
    inputs = processor(text="<s> <image> a", images=[picture])
    assert inputs["input_ids"].tolist() == [[1, IMAGE, 3]]
    wanted = CLIPImageProcessorPil.from_pretrained(folder)(picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(inputs["pixel_values"], wanted, atol=1e-5, rtol=0)


def test_its_config_is_that_of_a_prefix(original, tmp_path: Path) -> None:
    convert(original("llama"), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["connector"], config["fusion"], config["connector_norm"]) == ("mlp", "prefix", "none")
    assert (config["image_token_id"], config["first_added_token_id"], config["added_tokens"]) == (20, 20, 2)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "clip"}, "model_type='clip', not 'llava'"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act='relu': only 'gelu' is supported"),
        ({"vision_feature_select_strategy": "full"}, "only 'default' is supported"),
        ({"vision_feature_layer": [-2, -3]}, "one layer, counted from the last"),
        ({"image_token_index": 5}, "must be the first of the added ones"),
    ],
)
def test_what_ours_cannot_be_is_refused(fields: dict, said: str, original, tmp_path: Path) -> None:
    folder = shutil.copytree(original("llama"), tmp_path / "their")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    with pytest.raises(ValueError, match=said.replace("[", r"\[")):
        convert(folder, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no config.json there"):
        convert(tmp_path, tmp_path / "model")


def test_turns_of_a_prompt_end_with_the_token_that_the_model_learned(
    original, turns_end_with, tmp_path: Path
):
    convert(original("llama"), tmp_path / "model")
    turns_end_with("</s>", FlamingoProcessor.from_pretrained(tmp_path / "model"))


def test_prompts_begin_as_the_tokenizer_begins_texts_by_itself(original, beginning, begin, tmp_path: Path):
    convert(beginning(original("llama")), tmp_path / "model")
    begin(FlamingoProcessor.from_pretrained(tmp_path / "model"), 1)

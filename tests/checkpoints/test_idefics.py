"""Converted Idefics models against transformers' own, with random weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import IdeficsConfig, IdeficsForVisionText2Text
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil
from typer.testing import CliRunner

from flamingo.checkpoints.idefics import convert
from flamingo.cli import app
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.processing import FlamingoProcessor

WORDS, FAKE, IMAGE, END = 20, 20, 21, 22
ADDED = ("<fake_token_around_image>", "<image>", "<end_of_utterance>")
VARIANTS: dict[str, dict[str, Any]] = {
    "float": {},
    "vector": {"alpha_type": "vector", "cross_layer_interval": 1},
    "norms": {"qk_layer_norms": True, "perceiver": {"qk_layer_norms_perceiver": True}, "eps": 1e-2},
    "tied": {"tie_word_embeddings": True},
    "instruct": {"additional_vocab_size": 3},
}


@pytest.fixture(scope="module")
def original(tmp_path_factory, shake, word_tokenizer) -> Callable[[str], Path]:
    """original("norms"): the folder of an Idefics with random weights and open gates."""
    made: dict[str, Path] = {}

    def make(variant: str) -> Path:
        if variant in made:
            return made[variant]
        fields = dict(VARIANTS[variant])
        added = fields.setdefault("additional_vocab_size", 2)
        perceiver = {"use_resampler": True, "resampler_n_latents": 5, "resampler_depth": 2}
        perceiver |= {"resampler_n_heads": 3, "resampler_head_dim": 8, **fields.pop("perceiver", {})}
        tower = {"embed_dim": 32, "image_size": 16, "patch_size": 8, "intermediate_size": 40}
        tower |= {"num_hidden_layers": 2, "num_attention_heads": 4}
        lm = {"hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 4, "num_attention_heads": 4}
        config = IdeficsConfig(
            vocab_size=WORDS,
            use_resampler=True,
            rms_norm_eps=fields.pop("eps", 1e-6),
            perceiver_config=perceiver,
            vision_config=tower,
            **{"cross_layer_interval": 2, **lm, **fields},
        )
        model = IdeficsForVisionText2Text(config)
        shake(model)
        folder = tmp_path_factory.mktemp(variant)
        model.save_pretrained(folder, max_shard_size="100KB")  # several files, as released
        word_tokenizer(ADDED[:added]).save_pretrained(folder)
        made[variant] = folder
        return folder

    return make


def last_image(ids: torch.Tensor, images: int) -> torch.Tensor:
    """int64[B, T, N]: a one at the last picture up to each token."""
    count = (ids == IMAGE).cumsum(dim=1)
    return (torch.arange(1, images + 1) == count[..., None]).long()


def run(*arguments: str | Path):
    return CliRunner().invoke(app, ["convert", "idefics", *map(str, arguments)])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_converted_model_makes_the_same_logits(variant, original, tmp_path):
    folder = original(variant)
    result = run(folder, "--out", tmp_path / "model")
    assert result.exit_code == 0, result.output
    ours = FlamingoForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    theirs = IdeficsForVisionText2Text.from_pretrained(folder).eval()
    rows = {
        1: [[1, FAKE, IMAGE, FAKE, 3, 4, 5], [0, 1, 6, 7, IMAGE, FAKE, 8]],  # the second has text first
        2: [[FAKE, IMAGE, FAKE, 3, IMAGE, FAKE, 4], [1, 9, IMAGE, FAKE, IMAGE, FAKE, 5]],
    }
    for images, ids in rows.items():
        input_ids = torch.tensor(ids)
        mask = (input_ids != 0).long()  # one row is padded on the left
        pixels = torch.randn(2 * images, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            wanted = theirs(
                input_ids=input_ids,
                attention_mask=mask,
                pixel_values=pixels.view(2, images, 3, 16, 16),
                image_attention_mask=last_image(input_ids, images),
            ).logits
            out = ours(input_ids=input_ids, attention_mask=mask, pixel_values=pixels).logits
            blind = ours(input_ids=input_ids, attention_mask=mask, pixel_values=0 * pixels).logits
        assert out.shape == wanted.shape
        torch.testing.assert_close(out[mask > 0], wanted[mask > 0], atol=1e-5, rtol=1e-5)
        assert (out - blind).abs().max() > 0.01  # the picture does count


def test_a_converted_model_says_the_same(original, tmp_path):
    folder = original("float")
    convert(folder, tmp_path / "model")
    ours = FlamingoForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    theirs: Any = IdeficsForVisionText2Text.from_pretrained(folder).eval()
    ids, pixels = torch.tensor([[1, FAKE, IMAGE, FAKE, 3]]), torch.randn(1, 3, 16, 16)
    options: Any = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [1, 2, FAKE, IMAGE]}
    wanted = theirs.generate(
        input_ids=ids, pixel_values=pixels[None], image_attention_mask=last_image(ids, 1), **options
    )
    assert ours.generate(ids, pixel_values=pixels, **options).tolist() == wanted.tolist()


def test_the_folder_holds_config_and_processor(original, tmp_path):
    result = run(original("instruct"), "--out", tmp_path / "model")
    assert "<end_of_utterance> stands for <|endofchunk|>" in result.output
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["image_token_id"], config["end_of_chunk_token_id"]) == (IMAGE, END)
    assert (config["first_added_token_id"], config["added_tokens"]) == (WORDS, 3)
    processor: Any = FlamingoProcessor.from_pretrained(tmp_path / "model")
    assert (processor.image_token_id, processor.end_of_chunk_token_id) == (IMAGE, END)
    picture = Image.effect_noise((40, 24), 80).convert("RGB")
    text = "<s> a <fake_token_around_image> <image> <fake_token_around_image> b"
    inputs = processor(text=text, images=[picture])
    assert inputs["input_ids"].tolist() == [[1, 3, FAKE, IMAGE, FAKE, 4]]
    wanted = IdeficsImageProcessorPil(image_size=16)(picture, return_tensors="pt")
    torch.testing.assert_close(inputs["pixel_values"], wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["instruct", "float"])
def test_pictures_of_a_prompt_stand_between_the_tokens_that_the_model_learned(kind, original, tmp_path):
    """As its own processor writes them: one between neighbours, and where it also ends a turn."""
    convert(original(kind), tmp_path / "model")
    processor: Any = FlamingoProcessor.from_pretrained(tmp_path / "model")
    end = {"instruct": [END, FAKE], "float": [FAKE]}[kind]
    prompt = "<image><image> a<|endofchunk|><image> b"
    (ids,) = processor.token_ids([prompt])
    assert ids == [FAKE, IMAGE, FAKE, IMAGE, FAKE, 3, *end, IMAGE, FAKE, 4]
    own = "<fake_token_around_image><image><fake_token_around_image> a"
    assert processor.marked(own) == own == processor.marked("<image> a")
    picture = Image.new("RGB", (8, 8))
    assert processor(text=prompt, images=[picture] * 3)["input_ids"].tolist() == [ids]


def change(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("type", "model_type='llama'"),
        ("resampler", "use_resampler is false"),
        ("act", "hidden_act='gelu'"),
        ("interval", "cross_layer_interval=3 does not divide num_hidden_layers=4"),
        ("tokens", "<image> at id none"),
        ("config", "no config.json there"),
        ("weights", "no *.safetensors"),
        ("damaged", "damaged"),
        ("missing", "10 tensors missing (gated_blocks.1.attn_gate, "),
        ("unexpected", "1 tensors unexpected (extra.weight)"),
        ("width", "of another shape"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_in_one_line(what, said, original, word_tokenizer, tmp_path):
    folder = tmp_path / "idefics"
    shutil.copytree(original("float"), folder)
    if what == "type":
        change(folder, model_type="llama")
    if what == "resampler":
        change(folder, use_resampler=False)
    if what == "act":
        change(folder, hidden_act="gelu")
    if what == "interval":
        change(folder, cross_layer_interval=3)
    if what == "width":
        change(folder, intermediate_size=101)
    if what == "tokens":
        for file in folder.glob("token*"):
            file.unlink()
        word_tokenizer().save_pretrained(folder)
    if what == "config":
        (folder / "config.json").unlink()
    shards = sorted(folder.glob("*.safetensors"))
    if what == "weights":
        for shard in shards:
            shard.unlink()
    if what == "damaged":
        shards[0].write_bytes(b"no weights")
    if what in ("missing", "unexpected"):
        state = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
        extra = {"extra.weight": torch.ones(2)} if what == "unexpected" else {}
        kept = {n: t for n, t in state.items() if what != "missing" or "attn_layers.1" not in n}
        for shard in shards:
            shard.unlink()
        save_file({**kept, **extra}, folder / "model.safetensors")
    result = run(folder, "--out", tmp_path / "model")
    assert result.exit_code == 1 and not (tmp_path / "model").exists()
    lines = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and said in lines[0], result.output


def test_turns_of_a_prompt_end_with_the_token_that_the_model_learned(original, turns_end_with, tmp_path):
    convert(original("instruct"), tmp_path / "model")
    turns_end_with("<end_of_utterance>", FlamingoProcessor.from_pretrained(tmp_path / "model"))


def test_prompts_begin_as_the_tokenizer_begins_texts_by_itself(original, beginning, begin, tmp_path):
    convert(beginning(original("float")), tmp_path / "model")
    begin(FlamingoProcessor.from_pretrained(tmp_path / "model"), 1)

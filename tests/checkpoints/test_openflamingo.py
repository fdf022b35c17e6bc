"""Converted OpenFlamingo checkpoints against OpenFlamingo's own code, with random weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from flamingo.checkpoints.openflamingo import convert
from flamingo.checkpoints.tensors import width_ratio
from flamingo.cli import app
from flamingo.config import FlamingoConfig, FlamingoVisionConfig
from flamingo.cross_attention import GatedCrossAttentionBlock
from flamingo.media import Runs, sight
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.processing import FlamingoProcessor
from flamingo.resampler import PerceiverResampler

pytest.importorskip("open_flamingo", reason="pip install --no-deps open-flamingo==2.0.1 einops-exts")
from open_flamingo.src import helpers  # noqa: E402
from open_flamingo.src.flamingo import Flamingo  # noqa: E402
from open_flamingo.src.flamingo_lm import FlamingoLMMixin  # noqa: E402
from open_flamingo.src.utils import extend_instance  # noqa: E402

WORDS, END_OF_CHUNK, IMAGE = 20, 20, 21  # what tests/checkpoints/conftest.py makes
PATHS = {
    "opt": "model.decoder.layers",
    "llama": "model.layers",
    "gpt_neox": "gpt_neox.layers",
    "mpt": "transformer.blocks",
}
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}


@dataclass
class Original:
    """An OpenFlamingo with random weights, the file it saved, and what it was made of."""

    model: Any
    file: Path
    vision: str
    language: Path

    def arguments(self, out: Path, **changed: str) -> list[str]:
        given = {"vision": self.vision, "language": str(self.language), "every": "2", "out": str(out)}
        options = [part for key, value in {**given, **changed}.items() for part in (f"--{key}", value)]
        return ["convert", "openflamingo", str(self.file), *options]


@pytest.fixture(scope="module")
def original(language, clip, tmp_path_factory) -> Callable[..., Original]:
    """original("opt", every=2): as `open_flamingo.create_model_and_transforms` makes one."""
    made: dict[tuple, Original] = {}

    def make(family: str, every: int = 2, whole: bool = False) -> Original:
        if (family, every, whole) in made:
            return made[family, every, whole]
        folder = language(family)
        encoder: Any = open_clip.create_model("tiny-of", pretrained=str(clip))
        encoder.visual.output_tokens = True
        encoder.visual.final_ln_after_pool = True  # tokens before the norm, as in open_clip of 2023
        lm: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        extend_instance(lm, FlamingoLMMixin)
        lm.set_decoder_layers_attr_name(PATHS[family])
        lm.resize_token_embeddings(WORDS + 2 if family in ("opt", "llama") else WORDS + 3)
        torch.manual_seed(0)
        model: Any = Flamingo(encoder, lm, END_OF_CHUNK, IMAGE, vis_dim=48, cross_attn_every_n_layers=every)
        model.requires_grad_(False)
        trained = [model.perceiver, lm.gated_cross_attn_layers, lm.get_input_embeddings()]
        generator = torch.Generator().manual_seed(2)
        for parameter in (p for module in trained for p in module.parameters()):
            parameter.requires_grad_(True)
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
        lm.get_output_embeddings().weight.data[WORDS:] += 0.1  # as if they had been trained too
        state = model.state_dict()
        if not whole:
            state = saved_by_training(model, state)
        file = tmp_path_factory.mktemp("checkpoint") / "checkpoint.pt"
        if family == "opt":  # as a run on several GPUs saves it
            state = {f"module.{name}": tensor for name, tensor in state.items()}
            torch.save({"epoch": 1, "model_state_dict": state}, file)
        else:
            torch.save(state, file)
        made[family, every, whole] = Original(model.eval(), file, f"open_clip:tiny-of/{clip}", folder)
        return made[family, every, whole]

    return make


def saved_by_training(model: Any, state: dict) -> dict:
    """What OpenFlamingo's training script keeps: the trained parts, and all named like an embedding."""
    if hasattr(model.lang_encoder, "gpt_neox"):  # its table had another name in 2023
        state["lang_encoder.embed_out.weight"] = state.pop("lang_encoder.lm_head.weight")
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad and "embed" not in n}
    twice = ("lang_encoder.old_decoder_blocks", "lang_encoder.gated_cross_attn_layers", "vision_encoder")
    return {n: t for n, t in state.items() if n not in frozen and not n.startswith(twice)}


def state_of(original: Original) -> dict[str, torch.Tensor]:
    state = torch.load(original.file, weights_only=True)
    return {n.removeprefix("module."): t for n, t in state.get("model_state_dict", state).items()}


def run(arguments: list[str]):
    return CliRunner().invoke(app, arguments)


# -- the modules ---------------------------------------------------------------------------


def small_config(**fields) -> FlamingoConfig:
    return FlamingoConfig(
        text_config={"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1},
        vision_config=FlamingoVisionConfig(width=24, grid=[2, 2]),
        resampler_depth=2,
        resampler_latents=5,
        cross_attention_every=1,
        **fields,
    )


@pytest.mark.parametrize("frames", [0, 3])
def test_the_resamplers_are_the_same_function(frames, shake):
    theirs = helpers.PerceiverResampler(dim=24, depth=2, num_latents=5, max_num_frames=frames or None)
    shake(theirs)
    ours = PerceiverResampler(small_config(resampler_frames=frames))
    ours.load_state_dict(theirs.state_dict())
    clips = torch.randn(2, max(frames, 1), 4, 24)
    torch.testing.assert_close(ours(clips), theirs(clips[:, None])[:, 0], **CLOSE)


def test_the_gated_blocks_are_the_same_function(shake):
    theirs = helpers.GatedCrossAttentionBlock(dim=32, dim_visual=24)
    shake(theirs)
    ours = GatedCrossAttentionBlock(small_config(), 32, 24)
    ours.load_state_dict(theirs.state_dict())
    ids = torch.tensor([[1, IMAGE, 3, 4, IMAGE, 5], [IMAGE, 1, 2, IMAGE, 3, 4]])
    hidden, media = torch.randn(2, 6, 32), torch.randn(2, 2, 5, 24)
    runs = Runs.of(*sight(ids, IMAGE, "immediate"))
    out = ours(hidden, *ours.attn.project_media(media.flatten(0, 1)), runs)
    torch.testing.assert_close(out, theirs(hidden, media, ids == IMAGE), **CLOSE)


@pytest.mark.parametrize(("inner", "width"), [(12, 3), (11008, 4096), (5, 48), (7, 10), (29, 100)])
def test_a_feed_forward_gets_its_exact_width(inner, width):
    assert int(width * width_ratio(inner, width)) == inner


# -- whole models --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "every", "whole"),
    [("opt", 2, False), ("llama", 1, True), ("gpt_neox", 2, False), ("mpt", 4, False)],
)
def test_a_converted_model_makes_the_same_logits(family, every, whole, original, pixels, tmp_path):
    its = original(family, every, whole)
    result = run(its.arguments(tmp_path / "model", every=str(every)))
    assert result.exit_code == 0, result.output
    assert f"of {WORDS} rows" in result.output  # the LM's own table was trained
    ours = FlamingoForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    rows = {
        1: [[1, IMAGE, 3, 4, 5, END_OF_CHUNK], [IMAGE, 6, 7, 8, 9, 10]],
        2: [[IMAGE, 3, 4, END_OF_CHUNK, IMAGE, 5], [11, IMAGE, 7, IMAGE, 8, 9]],
    }
    for images, ids in rows.items():
        input_ids, media = torch.tensor(ids), pixels[: 2 * images]
        mask = torch.ones_like(input_ids)
        with torch.no_grad():
            theirs = its.model(
                media.view(2, images, 1, *media.shape[1:]), input_ids, attention_mask=mask
            ).logits[..., : WORDS + 2]
            out = ours(input_ids=input_ids, attention_mask=mask, pixel_values=media).logits
            blind = ours(input_ids=input_ids, attention_mask=mask, pixel_values=0 * media).logits
        torch.testing.assert_close(out, theirs, **CLOSE)
        assert (out - blind).abs().max() > 0.01  # the picture does count


def test_a_file_without_output_rows_says_so(original, tmp_path):
    """LLaMA's output table is frozen, apart, and not named like an embedding: it is not saved."""
    its = original("llama")
    result = run(its.arguments(tmp_path / "model"))
    assert result.exit_code == 0 and "no lang_encoder.lm_head.weight" in result.output
    model = FlamingoForConditionalGeneration.from_pretrained(tmp_path / "model")
    mean = model.get_output_embeddings().weight[:WORDS].mean(dim=0)
    torch.testing.assert_close(model.added_tokens.output, mean.expand(2, -1))


def test_frames_become_temporal_embeddings(original, tmp_path):
    its = original("mpt", 4)
    frames = torch.randn(3, 48)
    torch.save({**state_of(its), "perceiver.frame_embs": frames}, tmp_path / "video.pt")
    convert(tmp_path / "video.pt", its.vision, str(its.language), 4, tmp_path / "model")
    model: Any = FlamingoForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert model.config.resampler_frames == 3
    torch.testing.assert_close(model.resampler.frame_embs.detach(), frames)


def test_old_position_tables_are_left_out(original, tmp_path):
    its = original("gpt_neox")
    name = "lang_encoder.gpt_neox.layers.0.decoder_layer.attention"
    old = {f"{name}.bias": torch.ones(1, 1, 4, 4), f"{name}.rotary_emb.inv_freq": torch.ones(4)}
    torch.save({**state_of(its), **old}, tmp_path / "old.pt")
    convert(tmp_path / "old.pt", its.vision, str(its.language), 2, tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_the_folder_holds_config_and_processor(original, tmp_path):
    its = original("opt")
    assert run(its.arguments(tmp_path / "model")).exit_code == 0
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["cross_attention_every"], config["cross_attention_offset"]) == (2, 1)
    assert config["cross_attention_scale"] is None and config["resampler_heads"] == 8
    processor: Any = FlamingoProcessor.from_pretrained(tmp_path / "model")
    ids = processor.tokenizer("a <image> b <|endofchunk|>")["input_ids"]
    assert [id for id in ids if id >= WORDS] == [IMAGE, END_OF_CHUNK]
    again = run(its.arguments(tmp_path / "model"))
    assert again.exit_code == 1 and "nothing is overwritten" in again.output


# -- what is refused -----------------------------------------------------------------------


def edited(state: dict, change: str) -> dict:
    block = "lang_encoder.model.decoder.layers.1.gated_cross_attn_layer"
    table = "lang_encoder.model.decoder.embed_tokens.weight"
    if change == "cut":
        return {n: t for n, t in state.items() if not n.startswith("perceiver.layers.3.0")}
    if change == "words":
        tables = (table, "lang_encoder.lm_head.weight")
        return {n: t[:-1] if n in tables else t for n, t in state.items()}
    if change == "untied":
        return {**state, "lang_encoder.lm_head.weight": state[table] + 1}
    extra = {
        "time": {"perceiver.media_time_embs": torch.ones(4, 1, 48)},
        "strange": {"lang_encoder.adapter.weight": torch.ones(2), "extra": torch.ones(1)},
        "shape": {f"{block}.attn.to_out.weight": torch.ones(3, 3)},
        "width": {f"{block}.attn.norm.weight": torch.ones(64)},
        "vision": {"perceiver.latents": torch.ones(64, 1024)},
        "heads": {"perceiver.layers.0.0.to_q.weight": torch.ones(100, 48)},
    }
    return {**state, **extra[change]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("cut", r"7 tensors missing \(resampler.layers.3.0.norm_media.weight, .*, \.\.\.\)"),
        ("words", "21 rows, .* knows 20 tokens, which makes 22 or 23 rows"),
        ("untied", "differ, but are one table"),
        ("time", "media_time_embs.* not supported"),
        ("strange", r"2 tensors unexpected \(lang_encoder.adapter.weight, extra\)"),
        (
            "shape",
            r"1 tensors of another shape \(gated_blocks.0.attn.to_out.weight \[3, 3\] instead of",
        ),
        ("width", "width 64, .* has width 32"),
        ("vision", "encoder of width 1024, .* has width 48"),
        ("heads", "100 rows, which are no heads of 64"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(change, said, original, tmp_path):
    its = original("opt")
    torch.save(edited(state_of(its), change), tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=said):
        convert(tmp_path / "checkpoint.pt", its.vision, str(its.language), 2, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"every": "1"},
            "gated blocks at layers 1, 3; --every 1 would put them at 0, 1, .* use --every 2",
        ),
        ({"every": "0"}, "every"),
        ({"language": "llama"}, "layers at model.decoder.layers, --language .* at model.layers"),
        ({"language": "deep"}, "no --every fits"),
        ({"language": "/nowhere"}, "error: --language /nowhere"),
        ({"vision": "open_clip"}, "open_clip"),
        ({"vision": "clip:x"}, "choose one of"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(changed, said, original, language, tmp_path):
    its = original("opt")
    if changed.get("language") == "llama":
        changed = {"language": str(language("llama"))}
    if changed.get("language") == "deep":
        changed = {"language": str(language("opt", "deep", num_hidden_layers=6))}
    result = run(its.arguments(tmp_path / "model", **changed))
    assert result.exit_code != 0 and not (tmp_path / "model").exists()
    assert re.search(said, result.output), result.output
    if "every" not in changed or changed["every"] != "0":  # typer's own message is a box
        assert result.exit_code == 1
        assert [line for line in result.output.splitlines() if line][-1].startswith("error: ")


@pytest.mark.parametrize("content", ["text", "objects", "list", "nothing", "other"])
def test_a_file_that_is_no_checkpoint_is_refused(content, original, tmp_path):
    file = tmp_path / "checkpoint.pt"
    if content == "text":
        file.write_text("no weights")
    elif content == "nothing":
        file.write_bytes(b"")
    else:
        things: dict[str, Any] = {
            "objects": {"a": Path("/")},
            "list": [1],
            "other": {"model.weight": torch.ones(1)},
        }
        torch.save(things[content], file)
    with pytest.raises(ValueError, match="checkpoint"):
        its = original("opt")
        convert(file, its.vision, str(its.language), 2, tmp_path / "model")

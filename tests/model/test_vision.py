"""Every source of frozen encoders keeps the contract of `flamingo.vision`."""

from __future__ import annotations

import json
import shutil
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from flamingo import create, vision
from flamingo.config import FlamingoVisionConfig
from flamingo.modeling import FlamingoForConditionalGeneration

TINY_CLIP: dict[str, Any] = {
    "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 2, "width": 32, "head_width": 16},
    "text_cfg": {"layers": 1, "width": 16, "heads": 1, "vocab_size": 64, "context_length": 8},
    "embed_dim": 16,
}
TINY_VIT = {"image_size": 32, "img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3}
TINY_SWIN = {"image_size": 64, "img_size": 64, "window_size": 2, "embed_dim": 12}
TINY_SWIN |= {"depths": [1, 1], "num_heads": [1, 2]}

TINY_SIGLIP: dict[str, Any] = {
    "vision_cfg": {"timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": ""},
    "text_cfg": TINY_CLIP["text_cfg"],
    "embed_dim": 16,
}
TINY_SIGLIP["vision_cfg"] |= {"image_size": 160}

# Configs of transformers by the name that stands for a folder with one below.
TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TOWER |= {"image_size": 32, "patch_size": 16, "num_patches": 4, "mlp_ratio": 2}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TEXT |= {"vocab_size": 8, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}
BOTH = {"vision_config": TOWER, "text_config": TEXT}
TOWERS: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("clip", BOTH),
    "siglip": ("siglip", BOTH),
    "siglip2": ("siglip2", {**BOTH, "vision_config": {k: v for k, v in TOWER.items() if k != "image_size"}}),
    "dinov2": ("dinov2_with_registers", {**TOWER, "num_register_tokens": 3}),
    "convnext": ("convnext", {"hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "image_size": 64}),
}
TINY_IDEFICS = {"embed_dim": 32, "image_size": 32, "patch_size": 16, "intermediate_size": 40}
TINY_IDEFICS |= {"num_hidden_layers": 2, "num_attention_heads": 4}
GREY = {"mean": [0.5] * 3, "std": [0.5] * 3}

# One line per encoder family: source, name, fields for describe, then the grid and the width.
ENCODERS = [
    pytest.param("timm", "tf_efficientnet_lite0", {"image_size": 64}, [2, 2], 1280, id="timm-cnn"),
    pytest.param("timm", "resnet18", {"image_size": 96}, [3, 3], 512, id="timm-resnet"),
    pytest.param("timm", "test_convnext", {"image_size": 96}, [3, 3], 64, id="timm-convnext"),
    pytest.param("timm", "vit_tiny_patch16_224", TINY_VIT, [2, 2], 48, id="timm-vit"),
    pytest.param("timm", "test_vit", {"image_size": 64}, [4, 4], 64, id="timm-vit-other-size"),
    pytest.param("timm", "test_vit_relpos", {}, [10, 10], 96, id="timm-vit-no-class"),
    pytest.param("timm", "swin_tiny_patch4_window7_224", TINY_SWIN, [8, 8], 24, id="timm-swin"),
    pytest.param("open_clip", "ViT-B-32", TINY_CLIP, [2, 2], 32, id="open_clip-vit"),
    pytest.param("open_clip", "ViT-B-32", {**TINY_CLIP, "image_size": 64}, [4, 4], 32, id="open_clip-size"),
    pytest.param("open_clip", "ViT-B-16-SigLIP", TINY_SIGLIP, [10, 10], 64, id="open_clip-of-timm"),
    pytest.param("transformers", "clip", {}, [2, 2], 32, id="transformers-clip"),
    pytest.param("transformers", "siglip", {"image_size": 48}, [3, 3], 32, id="transformers-siglip"),
    pytest.param("transformers", "siglip2", {}, [2, 2], 32, id="transformers-siglip2"),
    pytest.param("transformers", "dinov2", {"layer": -2}, [2, 2], 32, id="transformers-dinov2"),
    pytest.param("transformers", "convnext", GREY, [2, 2], 16, id="transformers-convnext"),
    pytest.param("idefics", "idefics", TINY_IDEFICS, [1, 5], 32, id="idefics-class-and-patches"),
]


@pytest.fixture
def describe(tmp_path):
    """describe(source, name, fields); nothing but the config is left when it returns."""

    def described(source: str, name: str, fields: dict) -> FlamingoVisionConfig:
        if source != "transformers":
            return vision.source(source).describe(name, **fields)
        kind, config = TOWERS[name]
        folder = tmp_path / "tower"
        AutoConfig.for_model(kind, **config).save_pretrained(folder)
        found = vision.source(source).describe(str(folder), **fields)
        shutil.rmtree(folder)
        return found

    return described


def test_the_encoders_here_are_of_all_sources():
    """A new file in flamingo/vision needs a line in ENCODERS."""
    assert {encoder.values[0] for encoder in ENCODERS} == set(vision.sources())
    assert {"open_clip", "timm", "transformers"} <= set(vision.sources())


@pytest.mark.parametrize("name", vision.sources())
def test_every_source_describes_builds_and_loads(name):
    source = vision.source(name)
    for function in ("describe", "build", "load"):
        assert callable(getattr(source, function))
    assert source.__doc__


@pytest.mark.parametrize(("source", "name", "fields", "grid", "width"), ENCODERS)
def test_the_description_is_what_the_encoder_does(describe, source, name, fields, grid, width):
    torch.manual_seed(0)
    config = describe(source, name, fields)
    assert isinstance(config, FlamingoVisionConfig)
    assert (config.source, list(config.grid), config.width) == (source, grid, width)
    assert len(config.mean) == len(config.std) == 3 and min(config.std) > 0
    encoder = vision.build(config)
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    size = config.image_size
    pixels = torch.randn(2, 3, size, size)
    with torch.no_grad():
        out = encoder(pixels)
        assert out.shape == (2, grid[0] * grid[1], width) and out.isfinite().all()
        torch.testing.assert_close(encoder(pixels[1:]), out[1:], atol=1e-5, rtol=1e-4)


# With random weights, each place of the small CNN's grid sees the whole picture equally; the tokens
# of Idefics are one row with the class before it.
LOCAL = [e for e in ENCODERS if e.id not in ("timm-cnn", "idefics-class-and-patches")]


@pytest.mark.parametrize(("source", "name", "fields", "grid", "width"), LOCAL)
def test_places_come_row_by_row_like_the_picture(describe, source, name, fields, grid, width):
    """What changes in the top right corner shows most at that place of the grid."""
    torch.manual_seed(0)
    config = describe(source, name, fields)
    encoder = vision.build(config)
    side = config.image_size // grid[0]
    pixels = 0.1 * torch.randn(1, 3, config.image_size, config.image_size)
    other = pixels.clone()
    other[:, :, :side, -side:] += 0.2 * torch.randn(3, side, side)
    with torch.no_grad():
        change = (encoder(other) - encoder(pixels))[0].norm(dim=-1)
    assert int(change.argmax()) == grid[1] - 1


@pytest.mark.parametrize(("source", "name", "fields", "grid", "width"), ENCODERS)
def test_a_flamingo_with_this_encoder_is_saved_and_loaded(
    build, ids, describe, tmp_path, source, name, fields, grid, width
):
    """Buffers that are in no checkpoint and fields that the encoder was made with included."""
    base = build().config.to_dict()
    base["vision_config"] = describe(source, name, fields)
    torch.manual_seed(0)
    model = FlamingoForConditionalGeneration(type(build().config)(**base)).eval()
    model.save_pretrained(tmp_path)
    back = FlamingoForConditionalGeneration.from_pretrained(tmp_path)
    size = model.config.vision_config.image_size
    pixels = torch.randn(3, 3, size, size)
    torch.testing.assert_close(back.encode_images(pixels), model.encode_images(pixels), atol=1e-5, rtol=1e-4)
    assert back(input_ids=ids, pixel_values=pixels).logits.isfinite().all()


def test_what_an_encoder_was_made_with_is_part_of_its_saved_config(tmp_path):
    config = vision.source("timm").describe("vit_tiny_patch16_224", **TINY_VIT)
    config.save_pretrained(tmp_path)
    back = FlamingoVisionConfig.from_pretrained(tmp_path)
    expected = vision.build(config).state_dict()
    assert {k: v.shape for k, v in vision.build(back).state_dict().items()} == {
        k: v.shape for k, v in expected.items()
    }


def test_an_unknown_source_lists_the_choices():
    with pytest.raises(ValueError, match=r"'tim'.*open_clip.*timm"):
        vision.source("tim")


def test_a_source_may_live_outside_the_package(tmp_path, monkeypatch):
    (tmp_path / "vision_lab").mkdir()
    (tmp_path / "vision_lab" / "encoders.py").write_text(
        "import torch\ndef build(config):\n    return torch.nn.Linear(config.width, 1)\n"
        "def describe(name): ...\ndef load(module, name): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = FlamingoVisionConfig(source="vision_lab.encoders", name="own", width=7)
    encoder = vision.build(config)
    assert encoder.in_features == 7
    assert not encoder.weight.requires_grad and not encoder.training


@pytest.mark.parametrize("source", vision.sources())
def test_an_unknown_name_is_refused_by_name(source, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # only the wait goes
    with pytest.raises(ValueError, match="no_such_net"):
        vision.source(source).describe("no_such_net")


@pytest.fixture
def folder(tmp_path):
    """An encoder in timm's layout, with a classifier as released ones have it."""
    torch.manual_seed(1)
    weights = timm.create_model("test_efficientnet", num_classes=10).state_dict()
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_efficientnet"}))
    return tmp_path, weights


def test_a_local_folder_of_timm_is_described_and_loaded(folder):
    path, weights = folder
    source = vision.source("timm")
    config = source.describe(str(path), image_size=64)
    assert config.name == "test_efficientnet"  # the folder is needed once only
    encoder = vision.build(config)
    source.load(encoder, str(path))
    loaded = encoder.model.state_dict()
    assert loaded and all(torch.equal(value, weights[name]) for name, value in loaded.items())


def test_a_local_folder_that_lacks_weights_is_refused(folder):
    path, weights = folder
    weights.pop("blocks.1.0.bn1.weight")
    save_file(weights, path / "model.safetensors")
    source = vision.source("timm")
    encoder = vision.build(source.describe(str(path), image_size=64))
    with pytest.raises(ValueError, match=r"lack 1 tensors.*blocks\.1\.0\.bn1\.weight"):
        source.load(encoder, str(path))


def test_the_normalisation_of_a_local_folder_is_its_own(folder):
    """As timm writes it: `pretrained_cfg` in config.json."""
    path, _ = folder
    own = {"input_size": [3, 96, 96], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    fields = {"architecture": "test_efficientnet", "pretrained_cfg": own}
    (path / "config.json").write_text(json.dumps(fields))
    config = vision.source("timm").describe(str(path))
    assert (list(config.mean), list(config.std)) == (own["mean"], own["std"])
    assert (config.image_size, list(config.grid)) == (96, [3, 3])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"architecture.*transformers:FOLDER"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "clip"}'), "transformers:FOLDER"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights could be read"),
        (lambda folder: (folder / "model.safetensors").write_text("none"), "no weights could be read"),
        (
            lambda folder: (folder / "config.json").write_text('{"architecture": "test_vit"}'),
            "weights lack .*|no weights could be read",
        ),
    ],
    ids=["no-config", "config-of-transformers", "no-weights", "broken-weights", "weights-of-another"],
)
def test_a_folder_that_is_not_of_timm_is_refused(folder, make, message):
    path, _ = folder
    make(path)
    source = vision.source("timm")
    with pytest.raises(ValueError, match=message) as refused:
        source.load(vision.build(source.describe(str(path))), str(path))
    assert str(path) in str(refused.value)


def test_weights_of_timm_of_another_size_have_their_positions_resized(tmp_path):
    torch.manual_seed(0)
    whole = timm.create_model("test_vit")
    save_file(whole.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit"}))
    source = vision.source("timm")
    config = source.describe(str(tmp_path), image_size=96)
    encoder = vision.build(config)
    source.load(encoder, str(tmp_path))
    expected = timm.create_model("test_vit")
    expected.load_state_dict(whole.state_dict())
    expected.set_input_size(96)  # timm's own way
    pixels = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        tokens = expected.eval().forward_features(pixels)[:, 1:]
        torch.testing.assert_close(encoder(pixels), tokens, atol=1e-5, rtol=1e-4)
    assert config.image_size == 96 and encoder.model.pos_embed.shape[1] == 37


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("levit_128s", {"image_size": 96}, r"levit_128s.*image_size=96.*224"),
        ("test_vit.no_such_tag", {}, r"test_vit.no_such_tag.*tag"),
    ],
)
def test_what_timm_cannot_build_is_refused(name, fields, message):
    with pytest.raises(ValueError, match=message):
        vision.source("timm").describe(name, **fields)


def test_a_source_outside_the_package_that_cannot_be_used_is_refused():
    with pytest.raises(ValueError, match="choose one of .*timm.*or name a module"):
        vision.source("tim")
    with pytest.raises(ValueError, match=r"no module 'nobodys'.*PYTHONPATH.*open_clip, timm"):
        vision.source("nobodys.encoders")
    with pytest.raises(ValueError, match="'flamingo.config' lacks describe, build, load"):
        vision.source("flamingo.config")


# -- options reach the source through `flamingo.create` -----------------------------------------


@pytest.fixture
def parts(folder, tokenizer, tmp_path) -> dict[str, Any]:
    """Arguments of `create`: the encoder of `folder` and a tiny LM."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    lm = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=24, **sizes))
    lm.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    small = {"resampler_depth": 1, "resampler_width": 8, "resampler_heads": 1, "resampler_head_dim": 8}
    return {"vision": f"timm:{folder[0]}", "language": str(tmp_path / "lm"), **small}


def test_options_of_the_encoder_are_arguments_of_create(parts):
    model, processor = create(**parts, vision_options={"image_size": 96})
    assert model.config.vision_config.image_size == processor.image_processor.transform.size == 96
    assert list(model.config.vision_config.grid) == [3, 3]
    with pytest.raises(ValueError, match=r"vision_options=.*no_such_option"):
        create(**parts, vision_options={"no_such_option": 1})

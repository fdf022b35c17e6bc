"""Towers of transformers: the tokens are the library's own, taken at the layer that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, CLIPImageProcessor, CLIPVisionModelWithProjection
from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

from flamingo import vision

SIDE, PATCH, LAYERS = 32, 8, 3  # pixels, pixels, layers
TOWER = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 48}
TOWER |= {"image_size": SIDE, "patch_size": PATCH, "initializer_range": 0.2}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TEXT |= {"vocab_size": 8, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}
PATCHES = {**{k: v for k, v in TOWER.items() if k != "image_size"}, "num_patches": (SIDE // PATCH) ** 2}
BOTH = {"vision_config": TOWER, "text_config": TEXT}
KINDS: dict[str, dict[str, Any]] = {
    "clip": BOTH,
    "clip_vision_model": TOWER,
    "siglip": BOTH,
    "siglip2": {**BOTH, "vision_config": PATCHES},
    "dinov2": {**TOWER, "layerscale_value": 0.7},
    "dinov2_with_registers": {**TOWER, "num_register_tokens": 3},
    "vit": TOWER,
    "swin": {"image_size": 64, "embed_dim": 12, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2},
    "convnext": {"hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "image_size": 64},
    "beit": TOWER,
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    "vit_mae": TOWER,
    "bert": TEXT,
}
# Kind, the name of its final norm, tokens before the patches, and whether its output is normed.
FAMILIES = [
    ("clip", "post_layernorm", 1, False),
    ("siglip", "post_layernorm", 0, True),
    ("siglip2", "post_layernorm", 0, True),
    ("dinov2", "layernorm", 1, True),
    ("dinov2_with_registers", "layernorm", 4, True),
]
GREY = {"mean": [0.5] * 3, "std": [0.5] * 3}
source = vision.source("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """folder("clip"): a model of that kind with random weights, saved once."""

    def make(kind: str) -> str:
        path: Path = tmp_path_factory.getbasetemp() / f"transformers-{kind}"
        if not path.exists():
            torch.manual_seed(5)
            model = AutoModel.from_config(AutoConfig.for_model(kind, **KINDS[kind]))
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "norm" in name:  # so that a norm does not pass for another, or for none
                        parameter += 0.3 * torch.randn_like(parameter)
            model.save_pretrained(path)
        return str(path)

    return make


def original(path: str, pixels: Tensor, **options):
    """(tower, its output with all hidden states), by the library alone."""
    model: Any = AutoModel.from_pretrained(path).eval()
    tower = getattr(model, "vision_model", model)
    inputs = {"pixel_values": pixels, **options}
    if tower.config.model_type == "siglip2_vision_model":
        patches = torch.stack([convert_image_to_patches(picture, PATCH) for picture in pixels])
        places = [side // PATCH for side in pixels.shape[-2:]]
        inputs["pixel_values"] = patches
        inputs["pixel_attention_mask"] = torch.ones(patches.shape[:2], dtype=torch.long)
        inputs["spatial_shapes"] = torch.tensor([places] * len(pixels))
    with torch.no_grad():
        return tower, tower(**inputs, output_hidden_states=True)


def encoded(path: str, pixels: Tensor, **options) -> Tensor:
    encoder = vision.build(source.describe(path, **options))
    source.load(encoder, path)
    with torch.no_grad():
        return encoder(pixels)


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize("final_norm", [False, True])
@pytest.mark.parametrize("layer", [-1, -2, -LAYERS])
@pytest.mark.parametrize(("kind", "norm", "prefix", "normed"), FAMILIES)
def test_tokens_are_those_of_the_layer_with_or_without_the_norm(
    folder, pixels, kind, norm, prefix, normed, layer, final_norm
):
    tower, out = original(folder(kind), pixels)
    with torch.no_grad():
        expected = out.hidden_states[layer]
        other = tower.get_submodule(norm)(expected)
    expected, other = (other, expected) if final_norm else (expected, other)
    tokens = encoded(folder(kind), pixels, layer=layer, final_norm=final_norm)
    assert tokens.shape == (2, 16, 32)
    torch.testing.assert_close(tokens, expected[:, prefix:], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(tokens, other[:, prefix:], atol=1e-2)


@pytest.mark.parametrize(("kind", "norm", "prefix", "normed"), FAMILIES)
def test_unless_told_otherwise_tokens_are_as_the_tower_returns_them(
    folder, pixels, kind, norm, prefix, normed
):
    options = source.describe(folder(kind)).options or {}
    assert (options["final_norm"], options["prefix_tokens"]) == (normed, prefix)
    assert source.describe(folder(kind), layer=-2).options["final_norm"] is False
    _, out = original(folder(kind), pixels)
    expected = out.last_hidden_state[:, prefix:]
    torch.testing.assert_close(encoded(folder(kind), pixels), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "options", "tokens"),
    [
        ("clip", {"interpolate_pos_encoding": True}, slice(1, None)),
        ("siglip", {"interpolate_pos_encoding": True}, slice(None)),
        ("siglip2", {}, slice(None)),
        ("dinov2", {}, slice(1, None)),
    ],
)
def test_pictures_of_another_size_have_more_places(folder, kind, options, tokens):
    pixels = torch.randn(2, 3, 48, 48)
    config = source.describe(folder(kind), image_size=48)
    assert (config.image_size, list(config.grid)) == (48, [6, 6])
    _, out = original(folder(kind), pixels, **options)
    expected = out.last_hidden_state[:, tokens]
    torch.testing.assert_close(encoded(folder(kind), pixels, image_size=48), expected, atol=1e-5, rtol=1e-4)


def test_a_vision_transformer_loses_its_pooler_and_a_swin_keeps_its_grid(folder, pixels):
    _, out = original(folder("vit"), pixels)
    expected = out.last_hidden_state[:, 1:]
    torch.testing.assert_close(encoded(folder("vit"), pixels, **GREY), expected, atol=1e-5, rtol=1e-4)
    large = torch.randn(2, 3, 64, 64)
    _, out = original(folder("swin"), large)
    tokens = encoded(folder("swin"), large, **GREY)
    torch.testing.assert_close(tokens, out.last_hidden_state, atol=1e-5, rtol=1e-4)
    assert tokens.shape == (2, 64, 24)


def test_a_feature_map_is_a_grid_too(folder):
    pixels = torch.randn(2, 3, 64, 64)
    tower, out = original(folder("convnext"), pixels)
    grid = out.last_hidden_state.flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoded(folder("convnext"), pixels, **GREY), grid, atol=1e-5, rtol=1e-4)
    normed = encoded(folder("convnext"), pixels, final_norm=True, **GREY)
    torch.testing.assert_close(normed, tower.layernorm(grid).detach(), atol=1e-5, rtol=1e-4)


def test_a_tower_without_its_other_half_is_loaded_too(folder, pixels, tmp_path):
    config = AutoConfig.for_model("clip_vision_model", **TOWER)
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path)
    for path in (folder("clip_vision_model"), str(tmp_path)):
        _, out = original(path, pixels)
        expected = out.last_hidden_state[:, 1:]
        torch.testing.assert_close(encoded(path, pixels), expected, atol=1e-5, rtol=1e-4)


def test_what_is_not_needed_is_not_kept(folder):
    """Neither the layers after the one asked for nor the pooling, and of a vocabulary nothing."""
    names = vision.build(source.describe(folder("siglip"), layer=-2)).state_dict()
    assert any(".layers.1." in name for name in names)
    assert not any(".layers.2." in name or "head" in name or name == "norm.weight" for name in names)


# -- pictures as the image processor makes them -----------------------------------------------


def test_size_and_normalisation_are_those_of_the_image_processor(folder, tmp_path):
    own = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    AutoConfig.from_pretrained(folder("dinov2")).save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 80}, crop_size=48, **own).save_pretrained(tmp_path)
    config = source.describe(str(tmp_path))
    assert (list(config.mean), list(config.std)) == (own["image_mean"], own["image_std"])
    assert (config.image_size, list(config.grid)) == (48, [6, 6])
    assert source.describe(str(tmp_path), image_size=64).image_size == 64
    assert list(source.describe(str(tmp_path), **GREY).mean) == GREY["mean"]
    CLIPImageProcessor(size=40, do_center_crop=False, do_normalize=False).save_pretrained(tmp_path)
    config = source.describe(str(tmp_path))
    assert (config.image_size, list(config.mean), list(config.std)) == (40, [0.0] * 3, [1.0] * 3)


@pytest.mark.parametrize(
    ("kind", "mean"), [("clip", 0.48145466), ("siglip", 0.5), ("siglip2", 0.5), ("dinov2", 0.485)]
)
def test_without_one_they_are_those_of_the_family(folder, kind, mean):
    config = source.describe(folder(kind))
    assert (config.image_size, config.mean[0]) == (SIDE, mean)


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("bert", {}, "BertModel is no vision tower.*input_ids"),
        ("vit", {}, "give the options mean and std"),
        ("vit_mae", GREY, "5 tokens are no square grid"),
        ("resnet", GREY, "choose the side of a square.*image_size"),
        ("resnet", {**GREY, "image_size": 64, "final_norm": True}, "final_norm=True.*ResNetModel"),
        ("beit", {**GREY, "final_norm": True}, "final_norm=True.*BeitModel"),
        ("convnext", {**GREY, "layer": -2}, "layer=-2.*ConvNextModel differ"),
        ("clip", {"layer": 0}, r"layer=0.*-3\.\.-1"),
        ("clip", {"layer": -4}, r"layer=-4.*-3\.\.-1"),
        ("clip", {"image_size": 4}, "image_size=4"),
    ],
)
def test_what_a_tower_cannot_do_is_refused(folder, kind, options, message):
    with pytest.raises(ValueError, match=message):
        source.describe(folder(kind), **options)


@pytest.mark.parametrize("name", ["owner/no_such_net", "no_such_net", "/no/such/folder"])
def test_a_name_without_a_config_is_refused_with_what_to_write(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # only the wait goes
    with pytest.raises(ValueError, match=f"'{name}': neither a model of the Hugging Face hub nor a folder"):
        source.describe(name)


def test_code_of_a_repository_is_not_run(tmp_path):
    fields = '{"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}'
    (tmp_path / "config.json").write_text(fields)
    (tmp_path / "own.py").write_text("raise SystemExit('was run')")
    with pytest.raises(ValueError, match=str(tmp_path)):
        source.describe(str(tmp_path))


def test_a_folder_without_weights_or_with_too_few_is_refused(folder, tmp_path):
    AutoConfig.from_pretrained(folder("clip")).save_pretrained(tmp_path)
    encoder = vision.build(source.describe(str(tmp_path)))
    with pytest.raises(ValueError, match=rf"{tmp_path}.*no weights could be read"):
        source.load(encoder, str(tmp_path))
    weights = load_file(f"{folder('clip')}/model.safetensors")
    needed = "vision_model.encoder.layers.1.mlp.fc1.weight"
    without = {name: value for name, value in weights.items() if name != needed}
    save_file(without, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"lack 1 tensors.*{needed}"):
        source.load(encoder, str(tmp_path))
    # Of the text half, of the layers after the chosen one and of the norm that is not applied, all
    # may be missing.
    unneeded = ("text", "vision_model.encoder.layers.2", "vision_model.post_layernorm")
    rest = {name: value for name, value in weights.items() if not name.startswith(unneeded)}
    save_file(rest, tmp_path / "model.safetensors", {"format": "pt"})
    source.load(vision.build(source.describe(str(tmp_path), layer=-2)), str(tmp_path))
    with pytest.raises(ValueError, match="lack"):
        source.load(encoder, str(tmp_path))

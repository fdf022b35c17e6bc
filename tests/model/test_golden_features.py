"""Features of every source of encoders stay what they were: across versions of the libraries too.

For each case below, `golden_features.json` holds the patch grid of one fixed picture with weights
made by a rule that no library has a part in: shape, mean, standard deviation and some values.
A case that fails after an upgrade means that released models would see other features. To write the
file anew, after a change that is meant to change features:

    FLAMINGO_WRITE_GOLDEN=1 pytest tests/model/test_golden_features.py

and read the difference before it is committed: only the lines of the cases concerned may change.
"""

from __future__ import annotations

import json
import os
from math import prod
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from open_clip.transformer import QuickGELU
from torch import Tensor, nn
from transformers import AutoConfig

from flamingo import vision

FILE = Path(__file__).with_name("golden_features.json")
SAMPLES = 40
TOLERANCE = 1e-3  # of the features' standard deviation; processors differ by a hundredth of that

CLIP: dict[str, Any] = {
    "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 2, "width": 32, "head_width": 16},
    "text_cfg": {"layers": 1, "width": 16, "heads": 1, "vocab_size": 64, "context_length": 8},
    "embed_dim": 16,
}
TOWER = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
TOWER |= {"image_size": 32, "patch_size": 8}
PATCHES = {**{k: v for k, v in TOWER.items() if k != "image_size"}, "num_patches": 16}
IDEFICS = {"embed_dim": 32, "image_size": 32, "patch_size": 8, "intermediate_size": 40}
IDEFICS |= {"num_hidden_layers": 2, "num_attention_heads": 4}

# source, name (of transformers: a kind and its config), options of `describe`
CASES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "open_clip": ("open_clip", "ViT-B-32", CLIP),
    "open_clip-quick_gelu": ("open_clip", "ViT-B-32", {**CLIP, "quick_gelu": True}),
    "open_clip-final_norm": ("open_clip", "ViT-B-32", {**CLIP, "final_norm": True}),
    "open_clip-openai": ("open_clip", "ViT-L-14/openai", CLIP),
    "timm-resnet": ("timm", "test_resnet", {"image_size": 96}),
    "timm-efficientnet": ("timm", "test_efficientnet", {"image_size": 96}),
    "timm-convnext": ("timm", "test_convnext", {"image_size": 96}),
    "timm-vit": ("timm", "test_vit", {"image_size": 64}),
    "transformers-clip": ("transformers", ("clip_vision_model", TOWER), {}),
    "transformers-clip-llava": ("transformers", ("clip_vision_model", TOWER), {"layer": -2}),
    "transformers-clip-final_norm": ("transformers", ("clip_vision_model", TOWER), {"final_norm": True}),
    "transformers-clip-gelu": ("transformers", ("clip_vision_model", {**TOWER, "hidden_act": "gelu"}), {}),
    "transformers-siglip": ("transformers", ("siglip_vision_model", TOWER), {}),
    "transformers-siglip-no_norm": ("transformers", ("siglip_vision_model", TOWER), {"final_norm": False}),
    "transformers-siglip2": ("transformers", ("siglip2_vision_model", PATCHES), {}),
    "transformers-dinov2": ("transformers", ("dinov2", TOWER), {}),
    "transformers-dinov2-no_norm": ("transformers", ("dinov2", TOWER), {"final_norm": False}),
    "transformers-dinov2-registers": ("transformers", ("dinov2_with_registers", TOWER), {}),
    "idefics": ("idefics", "idefics", IDEFICS),
}

# Cases that differ in one thing, which the comparison must see.
DIFFERENT = [
    ("open_clip", "open_clip-quick_gelu"),
    ("open_clip", "open_clip-final_norm"),
    ("open_clip", "open_clip-openai"),
    ("transformers-clip", "transformers-clip-gelu"),
    ("transformers-clip", "transformers-clip-final_norm"),
    ("transformers-clip", "transformers-clip-llava"),
    ("transformers-siglip", "transformers-siglip-no_norm"),
    ("transformers-dinov2", "transformers-dinov2-no_norm"),
]


@torch.no_grad()
def fill(module: nn.Module) -> None:
    """Weights by name: matrices with rows of norm about 1, single rows about 1, biases small."""
    for name, value in module.named_parameters():
        seeded = torch.Generator().manual_seed(crc32(name.encode()))
        uniform = 2 * torch.rand(value.shape, generator=seeded, dtype=torch.float64) - 1
        if value.ndim > 1 and len(value) > 1:
            made = uniform * (3 / prod(value.shape[1:])) ** 0.5
        elif name.endswith("bias"):
            made = 0.1 * uniform
        else:  # norms, scales, and the tokens and positions that are added
            made = 1 + 0.5 * uniform
        value.copy_(made)


def picture(size: int) -> Tensor:
    """float[1, 3, H, W] of about -1..1: waves of another direction in each colour."""
    at = torch.arange(size, dtype=torch.float64) / size
    waves = [torch.sin(9 * c * at[:, None] + 14 * at) * torch.cos(5 * at[:, None] - 3 * c) for c in (1, 2, 3)]
    return torch.stack(waves).float()[None]


def features(case: str, folder: Path) -> Tensor:
    """float[G, E] of a case, on the fixed picture."""
    source, name, options = CASES[case]
    if source == "transformers":
        AutoConfig.for_model(name[0], **name[1]).save_pretrained(folder)
        name = str(folder)
    config = vision.source(source).describe(name, **options)
    encoder = vision.build(config)
    fill(encoder)
    with torch.no_grad():
        return encoder(picture(config.image_size))[0]


def summary(grid: Tensor) -> dict[str, Any]:
    values = grid.double().flatten()
    at = torch.linspace(0, len(values) - 1, SAMPLES).long()
    return {
        "shape": list(grid.shape),
        "mean": round(values.mean().item(), 6),
        "std": round(values.std().item(), 6),
        "values": [round(value, 6) for value in values[at].tolist()],
    }


def difference(found: dict[str, Any], golden: dict[str, Any]) -> float:
    """The largest, in standard deviations; infinite when the shapes differ."""
    if found["shape"] != golden["shape"]:
        return float("inf")
    pairs = [(found[key], golden[key]) for key in ("mean", "std")]
    pairs += zip(found["values"], golden["values"], strict=True)
    return max(abs(a - b) for a, b in pairs) / golden["std"]


def golden() -> dict[str, dict[str, Any]]:
    return json.loads(FILE.read_text())


@pytest.mark.skipif("FLAMINGO_WRITE_GOLDEN" not in os.environ, reason="writes the file on demand only")
def test_write_the_golden_features(tmp_path):
    made = {case: summary(features(case, tmp_path / case)) for case in CASES}
    lines = [f"{json.dumps(case)}: {json.dumps(made[case])}" for case in sorted(made)]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


@pytest.mark.parametrize("case", CASES)
def test_features_are_what_they_were(case, tmp_path):
    found = summary(features(case, tmp_path))
    assert difference(found, golden()[case]) < TOLERANCE, (found, golden()[case])


def test_every_source_and_nothing_else_is_in_the_file():
    assert {source for source, _, _ in CASES.values()} == set(vision.sources())
    assert golden().keys() == CASES.keys()


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_another_norm_activation_or_layer_is_seen(one, other, tmp_path):
    """By far: what differs between processors is never taken for it."""
    found = summary(features(one, tmp_path))
    assert difference(found, golden()[other]) > 10 * TOLERANCE


def test_a_switched_activation_or_norm_in_the_built_module_is_seen(tmp_path):
    """Not by the config: as a library would do it that changes its mind."""
    source, name, options = CASES["open_clip"]
    encoder = vision.build(vision.source(source).describe(name, **options))
    fill(encoder)

    def off() -> float:
        with torch.no_grad():
            return difference(summary(encoder(picture(32))[0]), golden()["open_clip"])

    assert off() < TOLERANCE
    blocks: Any = encoder.model.transformer.resblocks
    for other, own in ((QuickGELU(), nn.GELU()), (nn.SiLU(), nn.GELU())):
        for block in blocks:
            block.mlp.gelu = other
        assert off() > 10 * TOLERANCE
        for block in blocks:
            block.mlp.gelu = own
        assert off() < TOLERANCE
    encoder.final_norm = True
    assert off() > 10 * TOLERANCE


def test_noise_of_rounding_is_let_through(tmp_path):
    grid = features("open_clip", tmp_path)
    noise = 1e-5 * torch.randn(grid.shape, generator=torch.Generator().manual_seed(0))
    assert difference(summary(grid + noise * grid.std()), golden()["open_clip"]) < TOLERANCE

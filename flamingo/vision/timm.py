"""Encoders of timm: CNN feature maps and ViT patch tokens.

A name is one of timm's, or a local folder in timm's own layout: `config.json` with an
"architecture" and `model.safetensors`.

N images, H, W pixels, E channels, G grid positions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn

from flamingo.config import FlamingoVisionConfig


class TimmEncoder(nn.Module):
    """float[N, 3, H, W] normalised pixels -> float[N, G, E], the last feature map."""

    model: Any  # the library's own module

    def __init__(self, name: str, **kwargs):
        super().__init__()
        self.model = timm.create_model(name, pretrained=False, num_classes=0, **kwargs)

    def forward(self, pixel_values: Tensor) -> Tensor:
        # Channels last: twice as fast on a CPU, and what tensor cores want. The input decides for
        # the whole network, so the weights stay in the plain layout that every tool expects.
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        features = self.model.forward_features(pixel_values)
        if features.ndim == 4:  # a feature map
            if _channels_last(self.model):
                return rearrange(features, "n h w e -> n (h w) e")
            return rearrange(features, "n e h w -> n (h w) e")
        return features[:, self.model.num_prefix_tokens :]


def describe(name: str, *, image_size: int | None = None, **kwargs) -> FlamingoVisionConfig:
    """Read width, grid and normalisation off the architecture, on the meta device."""
    own = _folder_config(name).get("pretrained_cfg", {})
    name = _architecture(name)
    with torch.device("meta"):
        encoder = TimmEncoder(name, **kwargs).eval()
        data = timm.data.resolve_model_data_config(encoder.model)  # type: ignore[attr-defined]
        data.update({key: own[key] for key in ("input_size", "mean", "std") if key in own})
        size = image_size or data["input_size"][-1]
        shape = encoder.model.forward_features(torch.empty(1, 3, size, size)).shape
    if len(shape) == 4 and _channels_last(encoder.model):
        width, grid = shape[3], [shape[1], shape[2]]
    elif len(shape) == 4:
        width, grid = shape[1], [shape[2], shape[3]]
    else:
        side = int((shape[1] - encoder.model.num_prefix_tokens) ** 0.5)
        width, grid = shape[2], [side, side]
    return FlamingoVisionConfig(
        source="timm",
        name=name,
        image_size=size,
        width=width,
        grid=grid,
        mean=list(data["mean"]),
        std=list(data["std"]),
        options=kwargs or None,
    )


def build(config: FlamingoVisionConfig) -> nn.Module:
    return TimmEncoder(config.name, **(config.options or {}))


def load(encoder: nn.Module, name: str) -> None:
    """Pretrained weights into a built encoder: from the folder, or timm's own for a name."""
    folder = Path(name)
    if folder.is_dir():
        weights = load_file(folder / "model.safetensors")
    else:
        weights = timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    missing, _ = encoder.model.load_state_dict(weights, strict=False)  # type: ignore[union-attr]
    if missing:  # left-over classifier weights are expected, absent ones are not
        raise ValueError(f"{name}: weights lack {len(missing)} tensors, the first: {missing[0]}")


def _channels_last(model: nn.Module) -> bool:
    """Whether a model's feature map is [N, H, W, E] (Swin and its kin)."""
    return str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC")


def _folder_config(name: str) -> dict:
    """config.json of a local folder; empty for a name."""
    folder = Path(name)
    return json.loads((folder / "config.json").read_text()) if folder.is_dir() else {}


def _architecture(name: str) -> str:
    if Path(name).is_dir():
        return _folder_config(name)["architecture"]
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name[:8]}*")[:5]) or "see timm.list_models()"
        raise ValueError(f"vision name {name!r}: neither a folder nor a model of timm ({near})")
    return name

"""Encoders of timm: CNN feature maps and ViT patch tokens.

A name is one of timm's, or a local folder in timm's own layout: `config.json` with an
"architecture" and `model.safetensors`.

N images, H, W pixels, h, w rows and columns, E channels, G grid positions.
"""

from __future__ import annotations

import inspect
import json
import sys
from math import isqrt
from pathlib import Path
from typing import Any

import timm
import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from flamingo.config import FlamingoVisionConfig


class TimmEncoder(nn.Module):
    """float[N, 3, H, W] normalised pixels -> float[N, G, E], the last feature map."""

    model: Any  # the library's own module

    def __init__(self, name: str, **kwargs):
        super().__init__()
        self.fields = kwargs  # also `load` makes its model with them
        try:
            self.model = timm.create_model(name, pretrained=False, num_classes=0, **kwargs)
        except RuntimeError as error:  # an unknown tag, a size that the windows do not fit
            raise ValueError(f"vision name {name!r}: timm cannot build it: {error}") from error

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
    """Read width, grid and normalisation off the architecture, on the meta device.

    image_size: pixels, None: the model's own; a transformer is built for it (timm resizes the
    pretrained table of positions); kwargs: for `timm.create_model`.

    Raises ValueError for a name that is not timm's and for a size that the model cannot have.
    """
    own = _folder_config(name).get("pretrained_cfg", {})
    given, name = name, _architecture(name)
    with torch.device("meta"):
        encoder = TimmEncoder(name, **kwargs).eval()
        data = timm.data.resolve_model_data_config(encoder.model)  # type: ignore[attr-defined]
        data.update({key: own[key] for key in ("input_size", "mean", "std") if key in own})
        size = image_size or kwargs.get("img_size") or data["input_size"][-1]
        # A CNN takes any size as it is, a transformer must know it when it is made.
        takes_size = "img_size" in inspect.signature(type(encoder.model)).parameters
        if takes_size and "img_size" not in kwargs and size != encoder.model.default_cfg["input_size"][-1]:
            kwargs["img_size"] = size
            encoder = TimmEncoder(name, **kwargs).eval()
        try:
            shape = encoder.model.forward_features(torch.empty(1, 3, size, size)).shape
        except (AssertionError, RuntimeError) as error:
            raise ValueError(
                f"vision name {given!r}: image_size={size} does not fit it: {error}; its own size is "
                f"{data['input_size'][-1]}"
            ) from error
    width, grid = _grid(given, encoder.model, shape)
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
    """Pretrained weights into a built encoder: from the folder, or timm's own for a name.

    Raises ValueError when there are none, or they are not of this architecture.
    """
    assert isinstance(encoder, TimmEncoder)
    folder, model = Path(name), encoder.model
    try:
        if folder.is_dir():
            weights = load_file(folder / "model.safetensors")
            # As timm does for its own weights: older names, and positions of another image size.
            adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
            weights = adapt(weights, model) if adapt else weights
        else:
            made = timm.create_model(name, pretrained=True, num_classes=0, **encoder.fields)
            weights = made.state_dict()
        missing, _ = model.load_state_dict(weights, strict=False)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"timm:{name}: no weights could be read: {error}") from error
    if missing:  # left-over classifier weights are expected, absent ones are not
        raise ValueError(f"{name}: weights lack {len(missing)} tensors, the first: {missing[0]}")


def _grid(name: str, model: Any, shape: torch.Size) -> tuple[int, list[int]]:
    """Width and (rows, columns) of the shape of a model's features."""
    if len(shape) == 4:
        h, w, width = shape[1:] if _channels_last(model) else (shape[2], shape[3], shape[1])
        return width, [h, w]
    tokens = shape[1] - model.num_prefix_tokens if len(shape) == 3 else 0
    side = isqrt(tokens)
    if not tokens or side * side != tokens:
        raise ValueError(
            f"vision name {name!r}: timm's features {tuple(shape)} are no square grid of patches"
        )
    return shape[2], [side, side]


def _channels_last(model: nn.Module) -> bool:
    """Whether a model's feature map is [N, H, W, E] (Swin and its kin)."""
    return str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC")


def _folder_config(name: str) -> dict:
    """config.json of a local folder; empty for a name."""
    file = Path(name) / "config.json"
    if not file.parent.is_dir():
        return {}
    config = json.loads(file.read_text()) if file.is_file() else {}
    if "architecture" not in config:
        raise ValueError(
            f'vision name {name!r}: a folder of timm has a config.json that names an "architecture"; '
            "for one of Hugging Face transformers write transformers:FOLDER"
        )
    return config


def _architecture(name: str) -> str:
    architecture = _folder_config(name).get("architecture", name)
    if not timm.is_model(architecture):
        near = ", ".join(timm.list_models(f"*{architecture[:8]}*")[:5]) or "see timm.list_models()"
        raise ValueError(f"vision name {name!r}: neither a folder nor a model of timm ({near})")
    return architecture

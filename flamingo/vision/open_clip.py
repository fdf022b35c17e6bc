"""Vision transformers of open_clip, as patch tokens before the final norm.

A name is `ARCHITECTURE` or `ARCHITECTURE/PRETRAINED`, as open_clip lists them.

N images, H, W pixels, E channels, G grid positions.
"""

from __future__ import annotations

from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from flamingo.config import FlamingoVisionConfig


class OpenClipEncoder(nn.Module):
    """float[N, 3, H, W] normalised pixels -> float[N, G, E], patch tokens without the class."""

    model: Any  # the library's own module

    def __init__(self, name: str, **kwargs):
        super().__init__()
        config = open_clip.get_model_config(name)
        if config is None:
            raise ValueError(
                f"vision_config.name={name!r}: open_clip has no such model "
                "(open_clip.list_models() names them all)"
            )
        self.model = open_clip.create_model(name, pretrained=None, **kwargs).visual
        if not hasattr(self.model, "forward_intermediates"):
            raise ValueError(f"vision_config.name={name!r}: not a vision transformer of open_clip")

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model.forward_intermediates(
            pixel_values,
            indices=1,
            normalize_intermediates=False,
            intermediates_only=True,
            output_fmt="NLC",
        )["image_intermediates"][-1]


def describe(name: str, **kwargs) -> FlamingoVisionConfig:
    """Read width, grid and normalisation off the architecture."""
    name = name.partition("/")[0]
    encoder = OpenClipEncoder(name, **kwargs)
    size = encoder.model.image_size
    side = size[0] if isinstance(size, (tuple, list)) else size
    with torch.no_grad():
        shape = encoder(torch.zeros(1, 3, side, side)).shape
    mean = getattr(encoder.model, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN
    std = getattr(encoder.model, "image_std", None) or open_clip.OPENAI_DATASET_STD
    patches = int(shape[1] ** 0.5)
    return FlamingoVisionConfig(
        source="open_clip",
        name=name,
        image_size=side,
        width=shape[2],
        grid=[patches, patches],
        mean=list(mean),
        std=list(std),
        options=kwargs or None,
    )


def build(config: FlamingoVisionConfig) -> nn.Module:
    return OpenClipEncoder(config.name, **(config.options or {}))


def load(encoder: nn.Module, name: str) -> None:
    """Pretrained weights into a built encoder; a name without a tag has none."""
    architecture, _, tag = name.partition("/")
    if not tag:
        raise ValueError(f"open_clip:{name}: name the weights too, e.g. ViT-L-14/openai")
    visual = open_clip.create_model(architecture, pretrained=tag).visual
    encoder.model.load_state_dict(visual.state_dict())  # type: ignore[union-attr]

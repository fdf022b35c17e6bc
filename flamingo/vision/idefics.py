"""The vision tower of Idefics (version 1), as all its tokens: the class token, then the patches.

A name is a local folder of an Idefics model. The resampler of Idefics was trained to look at the class
token too, so the grid is one row of 1 + patches places: pictures have one size only, and maps of where
the model looks have no rows and columns.

N images, H, W pixels, E channels, G tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.idefics.configuration_idefics import IdeficsVisionConfig
from transformers.models.idefics.image_processing_idefics import IDEFICS_STANDARD_MEAN, IDEFICS_STANDARD_STD
from transformers.models.idefics.vision import IdeficsVisionTransformer

from flamingo.config import FlamingoVisionConfig

FIELDS = ("embed_dim", "image_size", "intermediate_size", "patch_size", "num_hidden_layers")
FIELDS += ("num_attention_heads", "num_channels", "hidden_act", "layer_norm_eps")
PREFIX = "model.vision_model."


class IdeficsEncoder(nn.Module):
    """float[N, 3, H, W] normalised pixels -> float[N, G, E], before the tower's last norm."""

    model: Any  # the library's own module

    def __init__(self, **tower):
        super().__init__()
        config = IdeficsVisionConfig(**tower)
        config._attn_implementation = "sdpa"
        self.model = IdeficsVisionTransformer(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values).last_hidden_state


def describe(name: str, **tower) -> FlamingoVisionConfig:
    """Read width and number of tokens off the folder's config.

    tower: fields of `IdeficsVisionConfig` that are others than the folder's; with "embed_dim" among
    them no folder is read. Raises ValueError for a folder without an Idefics.
    """
    if "embed_dim" not in tower:
        try:
            config: Any = AutoConfig.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"vision name {name!r}: no folder with the config.json of an Idefics") from error
        if config.model_type != "idefics":
            raise ValueError(f"vision name {name!r}: a {config.model_type}, not an Idefics (version 1)")
        tower = {**{field: getattr(config.vision_config, field) for field in FIELDS}, **tower}
    config = IdeficsVisionConfig(**tower)
    return FlamingoVisionConfig(
        source="idefics",
        name=name,
        image_size=config.image_size,
        width=config.embed_dim,
        grid=[1, 1 + (config.image_size // config.patch_size) ** 2],
        mean=list(IDEFICS_STANDARD_MEAN),
        std=list(IDEFICS_STANDARD_STD),
        options={field: getattr(config, field) for field in FIELDS},
    )


def build(config: FlamingoVisionConfig) -> IdeficsEncoder:
    return IdeficsEncoder(**(config.options or {}))


def load(encoder: nn.Module, name: str) -> None:
    """The tower's weights out of the folder's *.safetensors.

    Raises ValueError when the folder has none.
    """
    state = {}
    for shard in sorted(Path(name).glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            names = [each for each in file.keys() if each.startswith(PREFIX)]  # noqa: SIM118
            state.update({each.removeprefix(PREFIX): file.get_tensor(each) for each in names})
    if not state:
        raise ValueError(f"idefics:{name}: no {PREFIX}* in *.safetensors of this folder")
    encoder.model.load_state_dict(state)  # type: ignore[union-attr]

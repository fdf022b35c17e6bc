"""Vision transformers of open_clip, as patch tokens before or after the final norm.

A name is `ARCHITECTURE` or `ARCHITECTURE/PRETRAINED`, as open_clip lists them (PRETRAINED may also
be a local file of weights, as in `ViT-B-32//data/weights.pt`), or a local folder in open_clip's own
layout, `FOLDER` or `local-dir:FOLDER`, as `flamingo clip train` writes it.

N images, H, W pixels, E channels, G grid positions.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from math import isqrt
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import open_clip
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from flamingo.config import FlamingoVisionConfig

CONFIG, LOCAL = "open_clip_config.json", "local-dir:"
# Of a model whose sizes are all given, open_clip still wants the name of one that it knows.
STAND_IN = "ViT-B-32"
# The other half of a CLIP is never used: as small as it can be, whatever the architecture says.
NO_TEXT = {"layers": 1, "width": 8, "heads": 1, "vocab_size": 8, "context_length": 8}


class OpenClipEncoder(nn.Module):
    """float[N, 3, H, W] normalised pixels -> float[N, G, E], patch tokens without the class.

    final_norm: whether the tokens went through the norm before the head; quick_gelu: the
    activation x * sigmoid(1.702 x) of OpenAI's models instead of GELU, None: as the architecture
    says; image_size: pixels, None: the architecture's; fields: for `open_clip.create_model`.
    """

    model: Any  # the library's own module

    def __init__(
        self,
        name: str,
        *,
        final_norm: bool = False,
        quick_gelu: bool | None = None,
        image_size: int | None = None,
        **fields,
    ):
        super().__init__()
        base = name if open_clip.get_model_config(name) else _stand_in(name, fields)
        self.final_norm = final_norm
        self.fields: dict[str, Any] = dict(fields)  # also `load` makes its model with them
        if quick_gelu is not None:
            # Said twice: the first is what open_clip compares with the weights, the second decides.
            self.fields |= {"force_quick_gelu": quick_gelu, "quick_gelu": quick_gelu}
        if image_size is not None:
            self.fields["force_image_size"] = image_size
            if "vision_cfg" in fields:
                self.fields["vision_cfg"] = {**fields["vision_cfg"], "image_size": image_size}
        device = torch.get_default_device()
        with weights_come_later():
            clip: Any = open_clip.create_model(base, device=device, **{"text_cfg": NO_TEXT, **self.fields})
        self.model = clip.visual
        if final_norm and not _has_final_norm(self.model):
            raise ValueError(
                f"final_norm=True: {name} has no norm between its patch tokens and its pooling; "
                "set it to False"
            )

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model.forward_intermediates(
            pixel_values,
            indices=1,
            normalize_intermediates=self.final_norm,
            intermediates_only=True,
            output_fmt="NLC",
        )["image_intermediates"][-1]


def describe(
    name: str,
    *,
    image_size: int | None = None,
    final_norm: bool = False,
    quick_gelu: bool | None = None,
    **fields,
) -> FlamingoVisionConfig:
    """Read width, grid and normalisation off the architecture, on the meta device.

    image_size: pixels, None: the architecture's; final_norm: whether the tokens go through the
    final norm (OpenFlamingo's do not); quick_gelu: None: as the weights were trained, if it is
    known of the tag, else as the architecture says; fields: for `open_clip.create_model`. Of a
    folder, the config holds all sizes: it is built again where the folder is not.

    Raises ValueError for a name, a folder or an option that open_clip does not have.
    """
    if folder := local_folder(name):
        held, prepared = read_folder(folder)
        architecture, mean, std = folder.resolve().name, prepared["mean"], prepared["std"]
        vision = {key: value for key, value in held["vision_cfg"].items() if key != "timm_model_pretrained"}
        fields = {"embed_dim": held["embed_dim"], "vision_cfg": vision, **fields}
        known = (held,)
    else:
        architecture, _, tag = name.partition("/")
        # `ViT-L-14/openai`: the name of the architecture says GELU, the weights were trained with
        # QuickGELU, and open_clip only warns.
        known = (architecture_of(architecture), weights_of(architecture, tag))
        mean, std = _normalisation(architecture, tag)
    if quick_gelu is None:
        quick_gelu = any(each.get("quick_gelu", False) for each in known)
    options = {"final_norm": final_norm, "quick_gelu": quick_gelu, "image_size": image_size, **fields}
    with torch.device("meta"):
        encoder = OpenClipEncoder(architecture, **options).eval()
        size = encoder.model.image_size
        side = size[0] if isinstance(size, (tuple, list)) else size
        try:
            shape = encoder(torch.empty(1, 3, side, side)).shape
        except AssertionError as error:  # for convolutions, which open_clip gives no tokens of
            raise ValueError(
                f"vision name {name!r}: not a vision transformer of open_clip; for a CNN use timm:NAME"
            ) from error
    return FlamingoVisionConfig(
        source="open_clip",
        name=architecture,
        image_size=side,
        width=shape[2],
        grid=[isqrt(shape[1])] * 2,
        mean=list(mean),
        std=list(std),
        options=options,
    )


def build(config: FlamingoVisionConfig) -> OpenClipEncoder:
    return OpenClipEncoder(config.name, **(config.options or {}))


def load(encoder: nn.Module, name: str) -> None:
    """Pretrained weights into a built encoder: of a folder, a tag or a file.

    Raises ValueError when there are no such weights, or they are not of this architecture.
    """
    folder = local_folder(name)
    architecture, _, tag = (f"local-dir:{folder}", "", "") if folder else name.partition("/")
    if not tag and not folder:
        raise ValueError(f"open_clip:{name}: name the weights too, e.g. ViT-L-14/openai")
    if not folder:
        weights_of(architecture, tag)
    assert isinstance(encoder, OpenClipEncoder)
    try:
        clip: Any = open_clip.create_model(
            architecture, pretrained=tag or None, require_pretrained=True, **encoder.fields
        )
    except (RuntimeError, OSError, ValueError, UnpicklingError, SafetensorError) as error:
        raise ValueError(f"open_clip:{name}: no weights could be read: {error}") from error
    encoder.model.load_state_dict(clip.visual.state_dict())


def local_folder(name: str) -> Path | None:
    """The folder that a name means (FOLDER or local-dir:FOLDER); None: it is an architecture's.

    Raises ValueError for a folder that does not hold a model of open_clip.
    """
    folder = Path(name.removeprefix(LOCAL))
    if (folder / CONFIG).is_file():
        return folder
    if name.startswith(LOCAL) or (
        folder.is_dir() and open_clip.get_model_config(name.partition("/")[0]) is None
    ):
        raise ValueError(
            f"vision name {name!r}: the folder holds no model of open_clip (no {CONFIG}); one of timm is "
            "timm:FOLDER, one of Hugging Face transformers is transformers:FOLDER"
        )
    return None


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Architecture, and mean and std of RGB, of a folder in open_clip's own layout.

    Raises ValueError for a config that does not say them.
    """
    try:
        held = json.loads((folder / CONFIG).read_text())
        model, prepared = held["model_cfg"], held.get("preprocess_cfg", {})
        _ = model["embed_dim"], model["vision_cfg"], model["text_cfg"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / CONFIG} is no config of open_clip: {error!r}; it has a model_cfg with embed_dim, "
            "vision_cfg and text_cfg"
        ) from None
    usual = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    return model, {**usual, **prepared}


@contextmanager
def weights_come_later() -> Iterator[None]:
    """Within this `with`, open_clip does not warn that a model has random weights."""

    def other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("No pretrained weights loaded")

    root = logging.getLogger()
    root.addFilter(other)
    try:
        yield
    finally:
        root.removeFilter(other)


def _stand_in(name: str, fields: dict[str, Any]) -> str:
    """For a name that is none of open_clip's; raises ValueError unless the fields say all sizes."""
    if not {"embed_dim", "vision_cfg"} <= fields.keys():
        architecture_of(name)
    return STAND_IN


def architecture_of(name: str) -> dict:
    """open_clip's config of an architecture."""
    config = open_clip.get_model_config(name)
    if config is None:
        raise ValueError(
            f"vision name {name!r}: open_clip has no such architecture (open_clip.list_models() names "
            "them all); write ARCHITECTURE/PRETRAINED, e.g. ViT-L-14/openai"
        )
    return config


def weights_of(architecture: str, tag: str) -> dict:
    """What open_clip knows of pretrained weights; nothing of a file, or without a tag."""
    known = open_clip.get_pretrained_cfg(architecture, tag)
    if tag and not known and not Path(tag).is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
        raise ValueError(
            f"vision name '{architecture}/{tag}': {tag!r} is neither a file nor weights that open_clip "
            f"knows of {architecture} ({tags})"
        )
    return known


def _normalisation(architecture: str, tag: str) -> tuple[list[float], list[float]]:
    """Mean and std of RGB: of the tag, else what all weights of the architecture agree on."""
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    known = [weights_of(architecture, tag)] if tag else []
    known = [each for each in known if each] or [weights_of(architecture, each) for each in tags]
    pairs = {(tuple(each["mean"]), tuple(each["std"])) for each in known}
    mean, std = (
        pairs.pop() if len(pairs) == 1 else (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    return list(mean), list(std)


def _has_final_norm(visual: Any) -> bool:
    """Whether there is a norm of the patch tokens: CoCa's comes after its attention pooling."""
    if getattr(visual, "attn_pool", None) is not None:
        return False
    owner, name = (visual.trunk, "norm") if hasattr(visual, "trunk") else (visual, "ln_post")
    return not isinstance(getattr(owner, name, nn.Identity()), nn.Identity)

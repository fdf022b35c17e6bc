"""Vision transformers of open_clip, as patch tokens before or after the final norm.

A name is `ARCHITECTURE` or `ARCHITECTURE/PRETRAINED`, as open_clip lists them; PRETRAINED may also
be a local file of weights, as in `ViT-B-32//data/weights.pt`.

N images, H, W pixels, E channels, G grid positions.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from math import isqrt
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from flamingo.config import FlamingoVisionConfig

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
        _architecture(name)
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
        with _weights_come_later():
            clip: Any = open_clip.create_model(name, device=device, **{"text_cfg": NO_TEXT, **self.fields})
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
    known of the tag, else as the architecture says; fields: for `open_clip.create_model`.

    Raises ValueError for a name or an option that open_clip does not have.
    """
    architecture, _, tag = name.partition("/")
    if quick_gelu is None:
        # `ViT-L-14/openai`: the name of the architecture says GELU, the weights were trained with
        # QuickGELU, and open_clip only warns.
        known = (_architecture(architecture), _pretrained(architecture, tag))
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
    mean, std = _normalisation(architecture, tag)
    return FlamingoVisionConfig(
        source="open_clip",
        name=architecture,
        image_size=side,
        width=shape[2],
        grid=[isqrt(shape[1])] * 2,
        mean=mean,
        std=std,
        options=options,
    )


def build(config: FlamingoVisionConfig) -> OpenClipEncoder:
    return OpenClipEncoder(config.name, **(config.options or {}))


def load(encoder: nn.Module, name: str) -> None:
    """Pretrained weights into a built encoder; a name without a tag or a file has none.

    Raises ValueError when there are no such weights, or they are not of this architecture.
    """
    architecture, _, tag = name.partition("/")
    if not tag:
        raise ValueError(f"open_clip:{name}: name the weights too, e.g. ViT-L-14/openai")
    _pretrained(architecture, tag)
    assert isinstance(encoder, OpenClipEncoder)
    try:
        clip: Any = open_clip.create_model(architecture, pretrained=tag, **encoder.fields)
    except (RuntimeError, OSError, ValueError, UnpicklingError) as error:
        raise ValueError(f"open_clip:{name}: no weights could be read: {error}") from error
    encoder.model.load_state_dict(clip.visual.state_dict())


@contextmanager
def _weights_come_later() -> Iterator[None]:
    """Within this `with`, open_clip does not warn that a model has random weights."""

    def other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("No pretrained weights loaded")

    root = logging.getLogger()
    root.addFilter(other)
    try:
        yield
    finally:
        root.removeFilter(other)


def _architecture(name: str) -> dict:
    """open_clip's config of an architecture."""
    config = open_clip.get_model_config(name)
    if config is None:
        raise ValueError(
            f"vision name {name!r}: open_clip has no such architecture (open_clip.list_models() names "
            "them all); write ARCHITECTURE/PRETRAINED, e.g. ViT-L-14/openai"
        )
    return config


def _pretrained(architecture: str, tag: str) -> dict:
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
    known = [_pretrained(architecture, tag)] if tag else []
    known = [each for each in known if each] or [_pretrained(architecture, each) for each in tags]
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

"""A dual encoder of open_clip: made by name or by its sizes, and written as a folder of its own.

The only door to open_clip's models in this room.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import open_clip
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from flamingo.data.transforms import ImageTransform
from flamingo.train.contrastive.config import OWN, EncoderConfig
from flamingo.vision import open_clip as vision
from flamingo.written import compare, replacing

WEIGHTS = "open_clip_model.safetensors"
# Whose tokenizer a new model has, and whose settings it replaces by its own.
TEMPLATE = "ViT-B-32"
# What a sigmoid begins with, so that it is not swamped by the many wrong pairs (Zhai et al. 2023, 3.3).
SIGLIP = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}
CROPS = {"shortest": "center", "longest": "pad", "squash": "squash"}  # open_clip's words and ours
FAILURES = (TypeError, AssertionError, RuntimeError, OSError, ValueError, UnpicklingError, SafetensorError)


@dataclass
class DualEncoder:
    """model: open_clip's own, whose forward pass gives a dict of features of length 1, and the scale;
    tokenizer: texts -> int64[N, L]; config: what it is made of again."""

    model: Any
    tokenizer: Any
    config: dict[str, Any]

    @property
    def preparation(self) -> dict[str, Any]:
        """open_clip's `preprocess_cfg`."""
        known = open_clip.get_model_preprocess_cfg(self.model)
        return {key: known[key] for key in ("mean", "std", "interpolation", "resize_mode")}

    @property
    def transform(self) -> ImageTransform:
        """How pictures are prepared: as open_clip would for this model."""
        size = self.model.visual.image_size
        told = self.preparation
        return ImageTransform(
            size[0] if isinstance(size, (tuple, list)) else size,
            tuple(told["mean"]),
            tuple(told["std"]),
            told["interpolation"],
            CROPS[told["resize_mode"]],
        )

    def texts(self, captions: list[str]) -> torch.Tensor:
        """Captions -> int64[N, L]."""
        return self.tokenizer(captions)


def build(settings: EncoderConfig, loss: str) -> DualEncoder:
    """The model that a recipe begins with. loss: "siglip" gives it a bias, if it has none.

    Raises ValueError for a name, weights or sizes that open_clip cannot use.
    """
    name, weights, config = _chosen(settings)
    if loss == "siglip" and config.get("init_logit_bias") is None:
        config |= SIGLIP
    if "multimodal_cfg" in config:
        raise ValueError(f"model.name={settings.name!r} also writes captions: choose a CLIP or a SigLIP")
    fields = {key: config[key] for key in SIGLIP if key in config}
    fields |= {
        key: value for key in ("embed_dim", "vision_cfg", "text_cfg") if (value := getattr(settings, key))
    }
    folder = vision.local_folder(name)
    try:
        with vision.weights_come_later():
            model = open_clip.create_model(
                name,
                weights or None,
                require_pretrained=bool(weights or folder),
                force_quick_gelu=bool(config.get("quick_gelu")),
                force_image_size=settings.image_size,
                output_dict=True,
                **fields,
            )
        length: Any = None if settings.name else model.context_length
        tokenizer: Any = open_clip.get_tokenizer(name, context_length=length)
    except FAILURES as error:
        what = f"name={settings.name!r}" if settings.name else ", ".join(OWN)
        raise ValueError(f"model ({what}): open_clip cannot make it: {error}") from error
    _check_words(config, tokenizer)
    return DualEncoder(model, tokenizer, config)


def _chosen(settings: EncoderConfig) -> tuple[str, str, dict[str, Any]]:
    """open_clip's name, tag of the weights, and config of a model."""
    if not settings.name:
        sizes = {key: getattr(settings, key) for key in OWN}
        return TEMPLATE, "", sizes
    folder = vision.local_folder(settings.name)
    if folder:
        name, tag = f"local-dir:{folder}", ""
        config = vision.read_folder(folder)[0]
    else:
        name, _, tag = settings.name.partition("/")
        config = vision.architecture_of(name)
        if vision.weights_of(name, tag).get("quick_gelu"):
            config["quick_gelu"] = True
    if (settings.lock_image or settings.lock_text) and not (folder or tag):
        raise ValueError(f"model.name={settings.name!r} has random weights, which a lock keeps: name others")
    if settings.image_size:
        config["vision_cfg"] = {**config["vision_cfg"], "image_size": settings.image_size}
    return name, tag, config


def _check_words(config: dict[str, Any], tokenizer: Any) -> None:
    held = config["text_cfg"].get("vocab_size", 49408)
    if (known := getattr(tokenizer, "vocab_size", held)) > held:
        raise ValueError(
            f"model.text_cfg.vocab_size={held}: open_clip's tokenizer has {known} tokens: leave it out"
        )


def lock(encoder: DualEncoder, settings: EncoderConfig) -> None:
    """Take what the recipe locks out of the training."""
    if settings.lock_image:
        encoder.model.lock_image_tower(freeze_bn_stats=True)
    if settings.lock_text:
        encoder.model.lock_text_tower()


@torch.no_grad()
def export(encoder: DualEncoder, out: Path) -> None:
    """Write the model as a folder that open_clip loads as `local-dir:FOLDER`.

    The folder is complete or absent; one that is there is replaced. What was written is loaded
    again by open_clip and compared. Raises OSError where it reads otherwise.
    """
    # Copies: tensors that share memory are refused.
    state = {name: value.cpu().contiguous().clone() for name, value in encoder.model.state_dict().items()}
    with replacing(out) as part:
        save_file(state, part / WEIGHTS, metadata={"format": "pt"})
        if hasattr(encoder.tokenizer, "save_pretrained"):  # open_clip's own comes with open_clip
            encoder.tokenizer.save_pretrained(part)
        told = {"model_cfg": encoder.config, "preprocess_cfg": encoder.preparation}
        (part / vision.CONFIG).write_text(json.dumps(told, indent=2) + "\n")
        again = open_clip.create_model(f"local-dir:{part}", require_pretrained=True)
        compare(part, state, again.state_dict())

"""Model folders: made from two backbones, and opened again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from flamingo import vision
from flamingo.attention import attend_plainly
from flamingo.config import FlamingoConfig, FlamingoVisionConfig
from flamingo.factory import create
from flamingo.fusions import positions
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.runtime import arithmetic, dtype_of
from flamingo.written import replacing


def check_model(folder: Path) -> None:
    """Raises ValueError for a folder without a model, or with a model of another kind."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no model (no config.json): train one, or name its folder")
    try:
        kind = json.loads((folder / "config.json").read_text())["model_type"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder}/config.json is no model's: name a folder that flamingo made") from None
    if kind != FlamingoConfig.model_type:
        raise ValueError(
            f"{folder} holds a model of kind {kind!r}, not a Flamingo: name a folder that training, "
            "`flamingo create` or `flamingo convert` made"
        )


def load_model(
    folder: Path, device: torch.device | None = None, dtype: str = "auto"
) -> FlamingoForConditionalGeneration:
    """The model of a folder, ready to answer.

    device: None is a GPU if there is one; dtype: auto is as saved, but float32 on a machine that has no
    bfloat16 products. Raises ValueError as `check_model`.
    """
    check_model(folder)
    raised = dtype == "auto" and arithmetic() == "float32"
    model = FlamingoForConditionalGeneration.from_pretrained(folder, dtype="float32" if raised else dtype)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        attend_plainly(model.language_model)
    return model.eval().to(device)  # type: ignore[arg-type]


def load_encoder(folder: Path) -> tuple[nn.Module, FlamingoVisionConfig]:
    """The frozen vision encoder of a model folder alone, on the CPU, and its config.

    Nothing else is read. Raises ValueError as `check_model`, or where its weights are not there.
    """
    from safetensors import safe_open

    check_model(folder)
    config: Any = FlamingoConfig.from_pretrained(folder).vision_config
    encoder = vision.build(config)
    prefix, found = "vision_encoder.", {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 - no dict
            found |= {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    if missing := sorted(set(encoder.state_dict()) - set(found)):
        raise ValueError(f"{folder} lacks {len(missing)} weights of its encoder, as {missing[0]}")
    encoder.to(next(tensor.dtype for tensor in found.values() if tensor.is_floating_point()))
    encoder.load_state_dict(found)
    return encoder, config


def assemble(out: Path, vision: str, language: str, fields: list[str], dtype: str) -> str:
    """Write the folder of an untrained model; what was made, in a line.

    fields: key=value of FlamingoConfig, values in YAML. Raises ValueError for a folder that is
    there, a dtype or a field that is not known, and whatever `create` refuses.
    """
    if out.exists():
        raise ValueError(f"{out} is there already: choose another folder")
    if dtype not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"dtype={dtype!r}: choose auto, float32 or bfloat16")
    bad = [field for field in fields if "=" not in field]
    if bad:
        raise ValueError(f"{bad[0]!r}: write key=value, e.g. resampler_depth=2")
    pairs = (field.split("=", 1) for field in fields)
    architecture = {key: yaml.safe_load(value) for key, value in pairs}
    stored = dtype_of(dtype)
    model, processor = create(vision=vision, language=language, frozen_dtype=stored, **architecture)
    with replacing(out) as part:
        model.to(stored).save_pretrained(part)  # type: ignore[arg-type]
        processor.save_pretrained(part)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{out}: {trained / 1e6:.1f} M parameters to train, blocks at {positions(model.config)}"

"""The trained part of a model alone: one safetensors file without the frozen backbones.

Its metadata holds the config, so that the file and the names of the two backbones are all that a
model needs. A new model may begin with such a file, or with a whole model folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flamingo.config import FlamingoConfig
from flamingo.data.writing import write_aside
from flamingo.factory import create
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.processing import FlamingoProcessor

FORMAT = "flamingo trainables 1"
# Fields of the config that `create` finds out by itself.
FOUND = ("text_config", "vision_config", "first_added_token_id", "end_of_chunk_token_id", "image_token_id")


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """name -> tensor of all that is trained, each once."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def save_trainables(model: FlamingoForConditionalGeneration, path: str | Path) -> int:
    """Write the trained part of `model` to `path`, complete or not at all; its size in bytes.

    Raises ValueError where a folder has that name.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; name a file in it, e.g. {path / 'trained.safetensors'}")
    state = {name: tensor.cpu().contiguous() for name, tensor in trained_state(model).items()}
    config = model.config.to_json_string(use_diff=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {"format": FORMAT, "config": json.dumps(json.loads(config))}
    write_aside(path, lambda part: save_file(state, part, metadata=told))
    return path.stat().st_size


def load_trainables(model: FlamingoForConditionalGeneration, path: str | Path) -> None:
    """Put the trained part from a file into a model with the same architecture.

    Raises ValueError, naming tensors and shapes, when the file does not fit.
    """
    path, wanted = Path(path), trained_state(model)
    with _opened(path) as file:
        names = set(file.keys())
        missing, unexpected = sorted(set(wanted) - names), sorted(names - set(wanted))
        if missing or unexpected:
            raise ValueError(
                f"{path}: made for another architecture; missing {missing[:3] or 'nothing'} "
                f"({len(missing)} in all), unexpected {unexpected[:3] or 'nothing'} ({len(unexpected)})"
            )
        for name, parameter in wanted.items():
            shape = tuple(file.get_slice(name).get_shape())
            if shape != tuple(parameter.shape):
                raise ValueError(
                    f"{path}: {name} is {list(shape)}, the model has {list(parameter.shape)}: "
                    "another width, another number of latents, or another language model"
                )
        with torch.no_grad():
            for name, parameter in wanted.items():
                parameter.copy_(file.get_tensor(name))


def from_trainables(
    path: str | Path, *, vision: str, language: str, frozen_dtype: torch.dtype = torch.float32
) -> tuple[FlamingoForConditionalGeneration, FlamingoProcessor]:
    """Model and processor from a file of `save_trainables` and the two backbones (as in `create`).

    Raises ValueError when the backbones are not those that the file was trained with, as far as
    their sizes tell.
    """
    path = Path(path)
    fields = architecture_of(path)
    model, processor = create(vision=vision, language=language, frozen_dtype=frozen_dtype, **fields)
    _check_vocabulary(model, path)
    load_trainables(model, path)
    return model.eval(), processor


def architecture_of(path: str | Path) -> dict[str, Any]:
    """Fields of `create` that a model folder or a file of `save_trainables` was made with.

    Raises ValueError for one that is neither.
    """
    fields = _config(Path(path))
    known = FlamingoConfig.__annotations__.keys() - set(FOUND)
    return {name: fields[name] for name in known if name in fields}


def begin_with(model: FlamingoForConditionalGeneration, path: str | Path) -> None:
    """Put the weights of a trained model into a new one with the same architecture and backbones.

    path: a model folder, of which all is taken, the frozen parts too, since adapters may have been
    merged into them; or a file of `save_trainables`. Raises ValueError, naming tensors and shapes,
    for one that does not fit.
    """
    path = Path(path)
    _check_vocabulary(model, path)
    if not path.is_dir():
        load_trainables(model, path)
        return
    given: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        given |= load_file(file)
    own = model.state_dict()
    held = {own[name].data_ptr() for name in given if name in own}  # of tied tables only one is in the file
    missing = sorted(name for name in own if name not in given and own[name].data_ptr() not in held)
    wrong = sorted(name for name in given if name not in own or own[name].shape != given[name].shape)
    if missing or wrong:
        raise ValueError(
            f"{path}: made with another encoder, language model or architecture; "
            f"missing {missing[:3] or 'nothing'} ({len(missing)} in all), "
            f"not as here {wrong[:3] or 'nothing'} ({len(wrong)})"
        )
    model.load_state_dict(given, strict=False)


def _config(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"{path} is not there: name a model folder, or a file of `flamingo export`")
    if not path.is_dir():
        with _opened(path) as file:
            return json.loads(file.metadata()["config"])
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} holds no model (no config.json): train one, or name its folder")
    return FlamingoConfig.from_pretrained(path).to_dict()


def _check_vocabulary(model: FlamingoForConditionalGeneration, path: Path) -> None:
    trained, made = _config(path)["first_added_token_id"], model.config.first_added_token_id
    if trained != made:
        raise ValueError(
            f"{path}: trained with a vocabulary of {trained} tokens, the language model here has {made}"
        )


def _opened(path: Path):
    try:
        file = safe_open(path, framework="pt")
    except Exception as error:  # the library has its own error types for each fault
        raise ValueError(f"{path} is no safetensors file: {error}") from None
    if (file.metadata() or {}).get("format") != FORMAT:
        raise ValueError(f"{path} was not written by `flamingo export` (no format {FORMAT!r})")
    return file

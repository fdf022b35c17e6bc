"""Named tensors: read from files, compared with what a model has, written as a model folder.

Nothing here unpickles objects: a file that holds more than tensors and plain values is refused.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.processing import FlamingoProcessor
from flamingo.written import replacing

Tensors = dict[str, Tensor]
SHOWN = 4  # names in an error


def read_checkpoint(path: Path) -> Tensors:
    """Tensors of a file of `torch.save`: a flat dict, or a training run's with `model_state_dict`.

    A `module.` before every name (a run on several GPUs) is taken off.

    Raises ValueError for a file that is not one, or holds more than tensors and plain values;
    OSError for one that cannot be read.
    """
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: holds Python objects, which could run code when opened, or is no checkpoint: "
            "save its state dict alone, tensors by name"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: not a checkpoint of torch.save, or cut short") from error
    if isinstance(found, Mapping):
        found = found.get("model_state_dict", found)
    if not isinstance(found, Mapping) or not found or not all(isinstance(t, Tensor) for t in found.values()):
        raise ValueError(f"{path}: expected tensors by name, or a dict with model_state_dict that holds them")
    if all(name.startswith("module.") for name in found):
        found = {name.removeprefix("module."): tensor for name, tensor in found.items()}
    return dict(found)


def read_safetensors(folder: Path) -> Tensors:
    """Tensors of all *.safetensors files of a model folder.

    Raises ValueError where there are none, or one is damaged.
    """
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise ValueError(
            f"{folder}: no *.safetensors; save the model with save_pretrained of a recent transformers"
        )
    found: Tensors = {}
    for shard in shards:
        try:
            with safe_open(shard, framework="pt") as file:
                found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{shard}: damaged: {error}") from error
    return found


def check_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str) -> None:
    """Raises one ValueError that says which tensors are missing, unexpected or of another shape."""
    other_shape = [
        f"{name} {list(found[name].shape)} instead of {list(wanted[name].shape)}"
        for name in wanted
        if name in found and found[name].shape != wanted[name].shape
    ]
    problems = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "of another shape": other_shape,
    }
    told = [f"{len(names)} tensors {kind} ({_some(names)})" for kind, names in problems.items() if names]
    if told:
        raise ValueError(f"{where}: {'; '.join(told)}")


def width_ratio(inner: int, width: int) -> float:
    """The factor for which int(width * factor) is exactly `inner`."""
    ratio = inner / width
    while int(width * ratio) < inner:  # the quotient was rounded down
        ratio = math.nextafter(ratio, math.inf)
    assert int(width * ratio) == inner, (inner, width)
    return ratio


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def check_free(out: Path) -> None:
    """Raises ValueError where `out` holds something: nothing is overwritten."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists: name a new folder, nothing is overwritten")


def begins(tokenizer: Any) -> bool:
    """Whether a tokenizer puts a token before each text by itself, and nothing behind it."""
    return tokenizer("")["input_ids"] == [tokenizer.bos_token_id]


def save(model: FlamingoForConditionalGeneration, processor: FlamingoProcessor, out: Path) -> None:
    """A folder for `from_pretrained`; complete or absent."""
    with replacing(out) as part:
        model.save_pretrained(part)
        processor.save_pretrained(part)


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")

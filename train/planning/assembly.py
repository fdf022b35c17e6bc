"""A recipe's model on the meta device: from configs alone, no weight is read."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from flamingo import vision
from flamingo.config import FlamingoConfig
from flamingo.factory import _check_fields, _described
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.runtime import dtype_of
from flamingo.train.config import Recipe
from flamingo.train.optim import group_of
from flamingo.train.parts import add_adapters, architecture, unfreeze


def assemble(recipe: Recipe) -> FlamingoForConditionalGeneration:
    """The model as its last step trains it, on the meta device: frozen parts in `frozen_dtype`,
    trained ones in float32, adapters and all that is ever unfrozen included.

    Raises ValueError for a backbone whose config cannot be read, and for settings that it cannot have.
    """
    config = configuration(recipe)
    with vision.shapes_only(), torch.device("meta"):
        model = FlamingoForConditionalGeneration(config)
        dtype = dtype_of(recipe.model.frozen_dtype)
        for part in (model.language_model, model.vision_encoder):
            for parameter in part.parameters():  # type: ignore[union-attr]
                parameter.data = parameter.data.to(dtype)
        if recipe.lora:
            add_adapters(model, recipe.lora)
        unfreeze(model, recipe, recipe.steps)
    if recipe.activation_checkpointing:
        model.gradient_checkpointing_enable()
    return model.train()


def configuration(recipe: Recipe) -> FlamingoConfig:
    """The recipe's FlamingoConfig, as `flamingo.create` makes it, but for measured scales.

    Added tokens come after the LM's vocabulary: the tokenizer is not asked.
    """
    source, _, name = recipe.model.vision.partition(":")
    if not name:
        raise ValueError(f"model.vision={recipe.model.vision!r}: write source:name, e.g. timm:resnet50")
    text = language_config(recipe.model.language)
    first = text.get_text_config().vocab_size
    fields = architecture(recipe)
    _check_fields(fields)
    return FlamingoConfig(
        text_config=text,
        vision_config=_described(vision.source(source), name, recipe.model.vision_options),
        first_added_token_id=first,
        end_of_chunk_token_id=first,
        image_token_id=first + 1,
        **fields,
    )


def language_config(name: str) -> Any:
    """The LM's config, of a folder, the local cache or the hub. Raises ValueError where there is none."""
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.language={name!r}: its config.json is neither in a folder of this name nor in the local "
            "cache, and the hub cannot be asked. Fetch it once where there is a network "
            f"(hf download {name} config.json), or name a folder that holds it. "
            f"({(str(error).strip().splitlines() or [''])[0]})"
        ) from None


def parameters(model: FlamingoForConditionalGeneration) -> tuple[dict[str, int], dict[str, int]]:
    """(frozen by part, trained by group): numbers of parameters, tied ones once."""
    frozen: dict[str, int] = {}
    trained: dict[str, int] = {}
    tables = {id(part.weight) for part in (model.get_input_embeddings(), model.get_output_embeddings())}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = group_of(name, id(parameter) in tables)
            trained[group] = trained.get(group, 0) + parameter.numel()
        else:
            part = name.partition(".")[0]
            frozen[part] = frozen.get(part, 0) + parameter.numel()
    return frozen, trained


def bytes_of(model: nn.Module, trained: bool) -> int:
    """Bytes of the parameters that are trained, or of the others, tied ones once; with buffers these."""
    tensors = [p for p in model.parameters() if p.requires_grad == trained]
    tensors += [] if trained else list(model.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

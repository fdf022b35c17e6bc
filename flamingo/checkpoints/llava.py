"""LLaVA-1.5 of transformers -> a model folder with an MLP connector and the `prefix` fusion.

Its encoder is a CLIP that is read one layer before the last, its projector two linear layers, its LM a
causal LM whose table also holds the rows of `<image>` and of padding. All is in its folder.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlavaForConditionalGeneration

from flamingo import vision as vision_sources
from flamingo.checkpoints.tensors import begins, check_free, check_same, first_line, save
from flamingo.config import FlamingoConfig
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.processing import IMAGE, FlamingoImageProcessor, FlamingoProcessor

MOST_ADDED = 64  # tokens from <image> on: more, and it is no added token


def convert(folder: Path, out: Path) -> list[str]:
    """Write the model folder `out`; returns lines that say which token ends an answer.

    Raises ValueError for a folder that holds no LLaVA-1.5 with a tokenizer.
    """
    check_free(out)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json there: name the folder of a LLaVA")
    try:
        source: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        check_source(folder, source)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        theirs: Any = LlavaForConditionalGeneration.from_pretrained(folder)
    except OSError as error:
        raise ValueError(f"{folder}: {first_line(error)}") from error
    config = configuration(folder, source, tokenizer)
    language_model = language_model_of(theirs)
    ours = FlamingoForConditionalGeneration(config, language_model)
    vision_sources.source("transformers").load(ours.vision_encoder, str(folder))
    fill(ours, theirs, str(folder))
    ours.to(theirs.dtype)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(ours.generation_config, name, getattr(tokenizer, name))
    vision: Any = config.vision_config
    images = FlamingoImageProcessor(vision.image_size, vision.mean, vision.std)
    end = tokenizer.eos_token
    options = {"end_of_chunk_token": end, "add_special_tokens": begins(tokenizer)}
    processor = FlamingoProcessor(images, tokenizer, **options)
    save(ours, processor, out)
    return [f"{end} stands for <|endofchunk|>: an answer ends there"]


def check_source(folder: Path, source: Any) -> None:
    """Raises ValueError for a model that ours cannot be."""
    if source.model_type != "llava":
        raise ValueError(f"{folder}: config.json says model_type={source.model_type!r}, not 'llava'")
    wanted = {
        "vision_feature_select_strategy": ("default",),
        "projector_hidden_act": ("gelu",),
        "multimodal_projector_bias": (True,),
    }
    for name, choices in wanted.items():
        if getattr(source, name) not in choices:
            raise ValueError(f"{folder}: {name}={getattr(source, name)!r}: only {choices[0]!r} is supported")
    if not isinstance(source.vision_feature_layer, int) or source.vision_feature_layer >= 0:
        raise ValueError(
            f"{folder}: vision_feature_layer={source.vision_feature_layer!r}: one layer, counted from the "
            "last (-2), is supported"
        )


def configuration(folder: Path, source: Any, tokenizer: Any) -> FlamingoConfig:
    """FlamingoConfig of the same architecture. Raises ValueError where <image> is no added token."""
    first, known = source.image_token_id, len(tokenizer)
    named = tokenizer.convert_tokens_to_ids(IMAGE)
    if named != first or not 0 < known - first <= MOST_ADDED:
        raise ValueError(
            f"{folder}: {IMAGE} is token {first} of {known} by its config and {named} by its tokenizer: "
            "it must be the first of the added ones"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{folder}: its tokenizer has no eos_token: nothing would end an answer")
    return FlamingoConfig(
        text_config=copy.deepcopy(source.text_config),
        vision_config=vision_sources.source("transformers").describe(
            str(folder), layer=source.vision_feature_layer, final_norm=False
        ),
        connector="mlp",
        connector_norm="none",
        connector_activation="gelu",
        fusion="prefix",
        added_tokens=known - first,
        first_added_token_id=first,
        image_token_id=first,
        end_of_chunk_token_id=tokenizer.eos_token_id,
    )


def language_model_of(theirs: Any) -> nn.Module:
    """The causal LM within, of its own class."""
    config = copy.deepcopy(theirs.config.text_config)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=theirs.dtype, trust_remote_code=False)
    base = getattr(model, model.base_model_prefix)
    base.load_state_dict(theirs.model.language_model.state_dict())
    model.get_output_embeddings().load_state_dict(theirs.lm_head.state_dict())
    return model


@torch.no_grad()
def fill(ours: FlamingoForConditionalGeneration, theirs: Any, where: str) -> None:
    """Projector and the rows of added tokens. Raises ValueError for tensors of other shapes."""
    projector = theirs.model.multi_modal_projector
    first, count = ours.config.first_added_token_id, ours.config.added_tokens
    given: dict[str, Tensor] = {
        "resampler.project.0.weight": projector.linear_1.weight,
        "resampler.project.0.bias": projector.linear_1.bias,
        "resampler.project.2.weight": projector.linear_2.weight,
        "resampler.project.2.bias": projector.linear_2.bias,
        "added_tokens.input": theirs.get_input_embeddings().weight[first : first + count],
        "added_tokens.output": theirs.lm_head.weight[first : first + count],
    }
    own = {name: tensor for name, tensor in ours.named_parameters() if name in given or "resampler" in name}
    check_same(given, own, where)
    for name, tensor in given.items():
        own[name].copy_(tensor)

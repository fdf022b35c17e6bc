"""Idefics (version 1) of transformers -> a model folder.

Its LM is a LLaMA with rows of added tokens apart, its encoder a CLIP whose class token the
resampler sees too. Everything is in its folder, so nothing comes from elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, LlamaConfig

from flamingo import vision as vision_sources
from flamingo.checkpoints.tensors import (
    Tensors,
    begins,
    check_free,
    check_same,
    first_line,
    read_safetensors,
    save,
    width_ratio,
)
from flamingo.config import FlamingoConfig
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.processing import IMAGE, FlamingoImageProcessor, FlamingoProcessor

# What ends an answer, the first that the tokenizer has: a turn's end, or what begins a picture.
ENDS = ("<end_of_utterance>", "<fake_token_around_image>")

# What its names begin with, and ours; the first that fits.
PLACES = {
    "model.vision_model.": "vision_encoder.model.",
    "model.embed_tokens.additional_embedding.weight": "added_tokens.input",
    "model.perceiver_resampler.latents": "resampler.latents",
    "model.perceiver_resampler.layer_norm.": "resampler.norm.",
    "model.perceiver_resampler.blocks.": "resampler.layers.",
    "model.gated_cross_attn_layers.": "gated_blocks.",
    "model.": "language_model.model.",
    "lm_head.additional_fc.weight": "added_tokens.output",
    "lm_head.": "language_model.lm_head.",
}
# What is named otherwise within the layers of each. Keys and values are joined later.
WITHIN = {
    "resampler.layers.": {
        ".0.context_layer_norm.": ".0.norm_media.",
        ".0.latents_layer_norm.": ".0.norm_latents.",
        ".0.q_layer_norm.": ".0.q_norm.",
        ".0.k_layer_norm.": ".0.k_norm.",
        ".0.q_proj.": ".0.to_q.",
        ".0.k_proj.": ".0.to_k.",
        ".0.v_proj.": ".0.to_v.",
        ".0.output_proj.": ".0.to_out.",
        ".1.ln.": ".1.0.",
        ".1.fc.": ".1.1.",
        ".1.c_proj.": ".1.3.",
    },
    "gated_blocks.": {
        ".input_layernorm.": ".attn.norm.",
        ".cross_attn.q_layer_norm.": ".attn.q_norm.",
        ".cross_attn.k_layer_norm.": ".attn.k_norm.",
        ".cross_attn.q_proj.": ".attn.to_q.",
        ".cross_attn.k_proj.": ".attn.to_k.",
        ".cross_attn.v_proj.": ".attn.to_v.",
        ".cross_attn.o_proj.": ".attn.to_out.",
        ".alpha_cross_attn": ".attn_gate",
        ".post_attention_layernorm.": ".ff.norm.",
        ".mlp.gate_proj.": ".ff.gate.",
        ".mlp.up_proj.": ".ff.up.",
        ".mlp.down_proj.": ".ff.down.",
        ".alpha_dense": ".ff_gate",
    },
}
OLD_BUFFERS = (".inv_freq", ".position_ids")  # files of older transformers keep them


def convert(folder: Path, out: Path) -> list[str]:
    """Write the model folder `out`; returns lines that say which token ends an answer.

    Raises ValueError for a folder that holds no Idefics with a resampler, safetensors and tokenizer.
    """
    check_free(out)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json there: name the folder of an Idefics")
    try:
        source: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: {first_line(error)}") from error
    check_source(folder, source)
    end = check_tokens(folder, source, tokenizer)
    config = configuration(folder, source, tokenizer, end)
    given = joined(renamed(read_safetensors(folder)), source)
    model = FlamingoForConditionalGeneration(config)
    own = model.state_dict()
    check_same(given, own, str(folder))
    model.to(given["language_model.model.norm.weight"].dtype)  # pyright: ignore
    model.load_state_dict(given)
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    vision: Any = config.vision_config
    # Idefics ignores the aspect ratio of pictures.
    images = FlamingoImageProcessor(vision.image_size, vision.mean, vision.std, crop="squash")
    # As text, as its own processor writes it.
    first = tokenizer.bos_token if begins(tokenizer) else ""
    processor = FlamingoProcessor(images, tokenizer, end_of_chunk_token=end, begin_token=first)
    save(model, processor, out)
    return [f"{end} stands for <|endofchunk|>: an answer ends there or at {tokenizer.eos_token}"]


def check_source(folder: Path, source: Any) -> None:
    """Raises ValueError for a model that ours cannot be."""
    if source.model_type != "idefics":
        raise ValueError(f"{folder}: config.json says model_type={source.model_type!r}, not 'idefics'")
    if not source.use_resampler:
        raise ValueError(f"{folder}: use_resampler is false: a Flamingo has a resampler")
    if source.hidden_act != "silu":
        raise ValueError(f"{folder}: hidden_act={source.hidden_act!r}: only 'silu' is supported")
    if source.num_hidden_layers % source.cross_layer_interval:
        raise ValueError(
            f"{folder}: cross_layer_interval={source.cross_layer_interval} does not divide "
            f"num_hidden_layers={source.num_hidden_layers}"
        )


def check_tokens(folder: Path, source: Any, tokenizer: Any) -> str:
    """The token that ends an answer. Raises ValueError where the added tokens are not Idefics'."""
    known = tokenizer.get_vocab()
    end = next((token for token in ENDS if token in known), None)
    last = source.vocab_size + source.additional_vocab_size
    for token in (IMAGE, end or ENDS[-1]):
        if not source.vocab_size <= known.get(token, -1) < last:
            raise ValueError(
                f"{folder}: its tokenizer has {token} at id {known.get(token, 'none')}, which must be one of "
                f"the {source.additional_vocab_size} ids from vocab_size={source.vocab_size} on"
            )
    assert end is not None
    return end


def configuration(folder: Path, source: Any, tokenizer: Any, end: str) -> FlamingoConfig:
    """FlamingoConfig of the same architecture."""
    copied = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads hidden_act "
        "rms_norm_eps max_position_embeddings rope_parameters tie_word_embeddings "
        "pad_token_id bos_token_id eos_token_id"
    )
    perceiver = source.perceiver_config
    return FlamingoConfig(
        text_config=LlamaConfig(**{name: getattr(source, name) for name in copied.split()}),
        vision_config=vision_sources.source("idefics").describe(str(folder)),
        resampler_depth=perceiver.resampler_depth,
        resampler_heads=perceiver.resampler_n_heads,
        resampler_head_dim=perceiver.resampler_head_dim,
        resampler_latents=perceiver.resampler_n_latents,
        resampler_ff_mult=4.0,
        resampler_activation="relu",
        resampler_qk_norm="layer" if perceiver.qk_layer_norms_perceiver else "none",
        cross_attention_every=source.cross_layer_interval,
        cross_attention_offset=0,
        cross_attention_heads=source.num_attention_heads,
        cross_attention_head_dim=source.hidden_size // source.num_attention_heads,
        cross_attention_ff="swiglu",
        cross_attention_ff_mult=width_ratio(source.intermediate_size, source.hidden_size),
        cross_attention_norm="rms",
        cross_attention_qk_norm="rms" if source.qk_layer_norms else "none",
        cross_attention_eps=source.rms_norm_eps,
        gate_shape="channel" if source.alpha_type == "vector" else "scalar",
        added_tokens=source.additional_vocab_size,
        first_added_token_id=source.vocab_size,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        end_of_chunk_token_id=tokenizer.convert_tokens_to_ids(end),
    )


def renamed(state: Mapping[str, Tensor]) -> Tensors:
    """Under our names; what nothing here takes is refused later."""
    given = {}
    for name, tensor in state.items():
        if name.endswith(OLD_BUFFERS):
            continue
        old = next((place for place in PLACES if name.startswith(place)), "")
        new = name.replace(old, PLACES[old], 1) if old else name
        for part, ours in WITHIN.get(PLACES.get(old, ""), {}).items():
            if part in new:
                new = new.replace(part, ours, 1)
                break
        given[new] = tensor.flatten() if new.endswith("_gate") else tensor  # [1, 1, W] -> [W]
    return given


def joined(given: Tensors, source: Any) -> Tensors:
    """Keys and values as one projection, and the output tables of tied ones, which no file has."""
    for name in [name for name in given if name.endswith(".to_k.weight")]:
        values = name.replace(".to_k.", ".to_v.")
        if values in given:
            pair = [given.pop(name), given.pop(values)]  # keys first
            given[name.replace(".to_k.", ".to_kv.")] = torch.cat(pair)
    if source.tie_word_embeddings:
        for tied, table in (
            ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight"),
            ("added_tokens.output", "added_tokens.input"),
        ):
            if table in given:
                given.setdefault(tied, given[table])
    return given

"""OpenFlamingo's checkpoints -> a model folder.

Such a file holds what was trained: resampler, gated blocks and the whole token table, to which
the rows of the added tokens were appended; a training run's may hold frozen parts too. What it
does not hold comes from the frozen encoder and LM, by their names.
T tokens of the LM's own tokenizer, V rows of a table, W width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from flamingo import vision as vision_sources
from flamingo.checkpoints.tensors import (
    Tensors,
    check_free,
    check_same,
    first_line,
    read_checkpoint,
    save,
    width_ratio,
)
from flamingo.config import ADDED_TOKENS
from flamingo.decoder import find_decoder_layers
from flamingo.factory import create

HEAD_DIM = 64  # of every OpenFlamingo, in the resampler and in the blocks
BLOCK = re.compile(r"lang_encoder\.(?P<path>.+)\.(?P<layer>\d+)\.gated_cross_attn_layer\.(?P<rest>.+)")
# Second names of the same tensors, which a plain state_dict() has.
ALIASES = ("lang_encoder.old_decoder_blocks.", "lang_encoder.gated_cross_attn_layers.")
# Tables that older transformers kept among the weights and today's compute.
OLD_BUFFERS = (".attention.bias", ".attn.bias", ".masked_bias", ".inv_freq", ".position_ids")
# Names that transformers has given up since, and today's.
OLD_NAMES = {"lang_encoder.embed_out.": "lang_encoder.lm_head."}  # GPT-NeoX


@dataclass(frozen=True)
class Language:
    """What must be known of the frozen LM before its weights are read."""

    name: str
    layers_path: str
    layers: int
    width: int
    tokens: int  # T
    rows: int  # V of its input table
    inputs: tuple[str, ...]  # names of its input table: several where it is tied
    outputs: tuple[str, ...]

    @property
    def tied(self) -> bool:
        return self.inputs == self.outputs


def convert(checkpoint: Path, vision: str, language: str, every: int, out: Path) -> list[str]:
    """Write the model folder `out`; returns lines that say what was done with the tables.

    vision: "open_clip:ARCHITECTURE/WEIGHTS" that the model was trained with; language: name or
    folder of its frozen LM; every: the `cross_attn_every_n_layers` that it was made with.

    Raises ValueError for a file that is no OpenFlamingo checkpoint, and for one that was made
    with another interval, encoder, LM or vocabulary.
    """
    if every < 1:
        raise ValueError(f"--every {every}: must be at least 1")
    check_free(out)
    state = {_today(n): t for n, t in read_checkpoint(checkpoint).items() if not n.startswith(ALIASES)}
    lm = describe_language(language)
    check_language(checkpoint, state, lm, every)
    fields = architecture(checkpoint, state, vision)
    model, processor = create(
        vision=vision,
        language=language,
        cross_attention_every=every,
        cross_attention_offset=every - 1,  # layer i has a block iff (i + 1) % every == 0
        cross_attention_scale=None,
        **fields,
    )
    own = model.state_dict()
    notes, tables = split_tables(checkpoint, state, lm, own)
    given = {**renamed(state, lm, model.config.block_positions, own), **tables}
    frozen = {name: own[name] for name in own if name.startswith(("language_model.", "vision_encoder."))}
    check_same({**frozen, **given}, own, str(checkpoint))
    model.load_state_dict({**own, **given})
    save(model, processor, out)
    return notes


# -- what the file was made with --------------------------------------------------------------


def describe_language(name: str) -> Language:
    """Sizes and names of the LM, without its weights. Raises ValueError where there is none."""
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        tokens = len(AutoTokenizer.from_pretrained(name, trust_remote_code=False))
        with torch.device("meta"):
            lm: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"--language {name}: {first_line(error)}") from error
    layers = find_decoder_layers(lm)
    text = config.get_text_config()
    tables = lm.get_input_embeddings().weight, lm.get_output_embeddings().weight
    return Language(
        name=name,
        layers_path=next(path for path, module in lm.named_modules() if module is layers),
        layers=len(layers),
        width=text.hidden_size,
        tokens=tokens,
        rows=len(tables[0]),
        inputs=_names_of(lm, tables[0]),
        outputs=_names_of(lm, tables[1]),
    )


def check_language(file: Path, state: Mapping[str, Tensor], lm: Language, every: int) -> None:
    """Raises ValueError where the gated blocks do not belong to this LM at this interval."""
    found = [match for match in map(BLOCK.fullmatch, state) if match]
    if not found or "perceiver.latents" not in state:
        raise ValueError(
            f"{file}: not an OpenFlamingo checkpoint: no perceiver.latents or no "
            "lang_encoder....gated_cross_attn_layer among its tensors"
        )
    paths = sorted({match["path"] for match in found})
    if paths != [lm.layers_path]:
        raise ValueError(
            f"{file}: its language model has its layers at {', '.join(paths)}, --language {lm.name} at "
            f"{lm.layers_path}: that is another family of language models"
        )
    layers = sorted({int(match["layer"]) for match in found})
    if layers != positions(every, lm.layers):
        fits = [k for k in range(1, lm.layers + 1) if positions(k, lm.layers) == layers]
        raise ValueError(
            f"{file}: has gated blocks at layers {_listed(layers)}; --every {every} would put them at "
            f"{_listed(positions(every, lm.layers))} of the {lm.layers} layers of {lm.name}: "
            + (f"use --every {fits[0]}" if fits else "no --every fits, the language model is another one")
        )
    wide = state.get(f"lang_encoder.{lm.layers_path}.{layers[0]}.gated_cross_attn_layer.attn.norm.weight")
    if wide is not None and len(wide) != lm.width:
        raise ValueError(
            f"{file}: its gated blocks are for a language model of width {len(wide)}, "
            f"--language {lm.name} has width {lm.width}"
        )


def positions(every: int, layers: int) -> list[int]:
    """Layers with a gated block before them."""
    return [i for i in range(layers) if (i + 1) % every == 0]


def architecture(file: Path, state: Mapping[str, Tensor], vision: str) -> dict[str, Any]:
    """Fields of `FlamingoConfig`, read off the shapes.

    Raises ValueError for an encoder of another width and for what no field can say.
    """
    if "perceiver.media_time_embs" in state:
        raise ValueError(
            f"{file}: has perceiver.media_time_embs, an embedding for the place of a picture in the "
            "text, which is not supported: no released model has one"
        )
    latents, wide = state["perceiver.latents"].shape
    source, _, name = vision.partition(":")
    width = vision_sources.source(source).describe(name).width
    if wide != width:
        raise ValueError(
            f"{file}: its resampler is for an encoder of width {wide}, --vision {vision} has width {width}"
        )
    depth = {match[1] for match in (re.match(r"perceiver\.layers\.(\d+)\.", n) for n in state) if match}
    frames = state.get("perceiver.frame_embs")
    block = next(n.removesuffix("attn.to_q.weight") for n in state if n.endswith("layer.attn.to_q.weight"))
    return {
        "resampler_depth": len(depth),
        "resampler_latents": latents,
        "resampler_frames": 0 if frames is None else len(frames),
        "resampler_heads": _heads(file, state, "perceiver.layers.0.0.to_q.weight"),
        "resampler_head_dim": HEAD_DIM,
        "resampler_ff_mult": _ff_mult(file, state, "perceiver.layers.0.1.1.weight"),
        "cross_attention_heads": _heads(file, state, f"{block}attn.to_q.weight"),
        "cross_attention_head_dim": HEAD_DIM,
        "cross_attention_ff_mult": _ff_mult(file, state, f"{block}ff.1.weight"),
    }


def _heads(file: Path, state: Mapping[str, Tensor], name: str) -> int:
    inner = len(_tensor(file, state, name))
    if inner % HEAD_DIM:
        raise ValueError(f"{file}: {name} has {inner} rows, which are no heads of {HEAD_DIM}")
    return inner // HEAD_DIM


def _ff_mult(file: Path, state: Mapping[str, Tensor], name: str) -> float:
    return width_ratio(*_tensor(file, state, name).shape)


def _tensor(file: Path, state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise ValueError(f"{file}: 1 tensor missing ({name})")
    return state[name]


# -- its tensors under our names ----------------------------------------------------------------


def renamed(
    state: Mapping[str, Tensor], lm: Language, blocks: list[int], own: Mapping[str, Tensor]
) -> Tensors:
    """All but the two tables. A frozen part that the file holds too is taken from there.

    blocks: LM layers of the gated blocks; own: our model's tensors, to tell an old buffer.
    """
    given = {}
    for name, tensor in state.items():
        if name.removeprefix("lang_encoder.") in lm.inputs + lm.outputs:
            continue
        if match := BLOCK.fullmatch(name):
            new = f"gated_blocks.{blocks.index(int(match['layer']))}.{match['rest']}"
        elif name.startswith("perceiver."):
            new = name.replace("perceiver.", "resampler.", 1)
        elif name.startswith("vision_encoder."):
            new = name.replace("vision_encoder.", "vision_encoder.model.", 1)
        else:
            inner = name.removeprefix("lang_encoder.")
            new = "language_model." + re.sub(r"\.(\d+)\.decoder_layer\.", r".\1.", inner, count=1)
            if new not in own and new.endswith(OLD_BUFFERS):
                continue
        given[new if new in own else name] = tensor  # the file's own name, where nothing takes it
    return given


def split_tables(
    file: Path, state: Mapping[str, Tensor], lm: Language, own: Mapping[str, Tensor]
) -> tuple[list[str], Tensors]:
    """The LM's own rows and those of the added tokens, from the file's tables float[V, W].

    Raises ValueError for a table of another vocabulary, and where there is none.
    """
    notes, given = [], {}
    inputs, outputs = _table(file, state, lm, lm.inputs), _table(file, state, lm, lm.outputs)
    if inputs is None:
        raise ValueError(
            f"{file}: 1 tensor missing (lang_encoder.{lm.inputs[0]}): without it the added tokens "
            f"{', '.join(ADDED_TOKENS)} have no embeddings"
        )
    if outputs is None:
        # OpenFlamingo's own training leaves a frozen output table out of the file.
        notes.append(
            f"no lang_encoder.{lm.outputs[0]} in the file: the model cannot have learned to say "
            f"{', '.join(ADDED_TOKENS)}; their output rows are the mean row"
        )
    for kind, names, table in (("input", lm.inputs, inputs), ("output", lm.outputs, outputs)):
        ours = own[f"language_model.{names[0]}"]
        if table is None:
            mean = ours[: lm.tokens].float().mean(dim=0)
            given[f"added_tokens.{kind}"] = mean.expand(len(ADDED_TOKENS), -1)
            continue
        new = ours.clone()
        new[: lm.tokens] = table[: lm.tokens].to(ours.dtype)
        changed = int((new != ours).any(dim=1).sum())
        if changed and not (lm.tied and kind == "output"):
            notes.append(f"{changed} of {lm.tokens} rows of {names[0]} were trained: the file's are kept")
        given.update({f"language_model.{name}": new for name in names})
        given[f"added_tokens.{kind}"] = table[lm.tokens : lm.tokens + len(ADDED_TOKENS)]
    return notes, given


def _table(file: Path, state: Mapping[str, Tensor], lm: Language, names: tuple[str, ...]) -> Tensor | None:
    tables = [state[f"lang_encoder.{name}"] for name in names if f"lang_encoder.{name}" in state]
    if not tables:
        return None
    if any(not torch.equal(table, tables[0]) for table in tables):
        raise ValueError(
            f"{file}: {' and '.join(names)} differ, but are one table in {lm.name}: set "
            "tie_word_embeddings to false in its config.json"
        )
    added = lm.tokens + len(ADDED_TOKENS)
    # One row more for <PAD>, or a table that was large enough and kept its size.
    if len(tables[0]) not in {added, added + 1, max(lm.rows, added)}:
        raise ValueError(
            f"{file}: lang_encoder.{names[0]} has {len(tables[0])} rows, {lm.name} knows {lm.tokens} tokens, "
            f"which makes {added} or {added + 1} rows with the added ones: the vocabulary is another one"
        )
    return tables[0]


def _today(name: str) -> str:
    for old, new in OLD_NAMES.items():
        if name.startswith(old):
            return name.replace(old, new, 1)
    return name


def _names_of(module: nn.Module, tensor: Tensor) -> tuple[str, ...]:
    """All names of a parameter: a tied one has several."""
    named = module.named_parameters(remove_duplicate=False)
    return tuple(name for name, parameter in named if parameter is tensor)


def _listed(numbers: list[int]) -> str:
    some = ", ".join(map(str, numbers[:4]))
    return f"{some}, ..., {numbers[-1]}" if len(numbers) > 5 else ", ".join(map(str, numbers)) or "none"

"""A checkpoint as OpenFlamingo's training writes it, made by its own code: a GPT-NeoX of two layers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from tests.checkpoints.conftest import randomise
from tests.eval.harness_model import tokenizer


@dataclass(frozen=True)
class Old:
    """The file, and what was frozen beside it."""

    checkpoint: Path
    vision: str
    language: Path


def write_old(folder: Path) -> Old:
    """Needs the package open-flamingo."""
    from open_flamingo.src.flamingo import Flamingo
    from open_flamingo.src.flamingo_lm import FlamingoLMMixin
    from open_flamingo.src.utils import extend_instance

    from tests.checkpoints.test_openflamingo import saved_by_training

    folder.mkdir(parents=True)
    clip = _clip(folder)
    encoder: Any = open_clip.create_model("tiny-old", pretrained=str(clip))
    encoder.visual.output_tokens = encoder.visual.final_ln_after_pool = True
    language, words = folder / "language", len(tokenizer())
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    fields = {"vocab_size": words, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    frozen = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, **fields))  # type: ignore[arg-type]
    randomise(frozen)
    frozen.save_pretrained(language)
    tokenizer().save_pretrained(language)
    lm: Any = AutoModelForCausalLM.from_pretrained(language, attn_implementation="eager")
    extend_instance(lm, FlamingoLMMixin)
    lm.set_decoder_layers_attr_name("gpt_neox.layers")
    lm.resize_token_embeddings(words + 2)
    model: Any = Flamingo(encoder, lm, words, words + 1, vis_dim=48, cross_attn_every_n_layers=2)
    model.requires_grad_(False)
    for module in (model.perceiver, lm.gated_cross_attn_layers, lm.get_input_embeddings()):
        module.requires_grad_(True)
        randomise(module, seed=1)
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):  # wide open: pictures matter to what it says
            parameter.data.fill_(0.9)
    torch.save(saved_by_training(model, model.state_dict()), folder / "checkpoint.pt")
    return Old(folder / "checkpoint.pt", f"open_clip:tiny-old/{clip}", language)


def _clip(folder: Path) -> Path:
    """Weights of a tiny CLIP, whose architecture open_clip then knows by name."""
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 48, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1},
    }
    (folder / "tiny-old.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny-old.json")
    clip = open_clip.create_model("tiny-old")
    randomise(clip)
    torch.save(clip.state_dict(), folder / "clip.pt")
    return folder / "clip.pt"

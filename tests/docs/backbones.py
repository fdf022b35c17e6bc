"""What `flamingo backbones` makes, in small: an encoder and a language model of two layers, random."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.eval.harness_model import tokenizer


def write_backbones(folder: Path, width: int = 32) -> tuple[Path, Path]:
    """The folders of encoder and language model, called as the quickstart's. width: of the latter."""
    vision, language = folder / "efficientnet-lite0", folder / "smollm2-135m-instruct"
    vision.mkdir(parents=True)
    torch.manual_seed(0)
    weights = timm.create_model("test_efficientnet", num_classes=0).state_dict()
    save_file({k: v.contiguous() for k, v in weights.items()}, vision / "model.safetensors")
    (vision / "config.json").write_text('{"architecture": "test_efficientnet"}')
    words = tokenizer()
    words.save_pretrained(language)
    sizes = {"hidden_size": width, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    fields = {"vocab_size": len(words), "initializer_range": 0.5, "pad_token_id": 0, "eos_token_id": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, **fields, bos_token_id=None)).save_pretrained(language)  # type: ignore
    return vision, language

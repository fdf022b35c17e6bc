"""Configs of published backbones, as their config.json have them: facts, without weights or network."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig, AutoImageProcessor, PreTrainedConfig

QWEN3 = {"model_type": "qwen3", "head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151936}
MPT = {"model_type": "mpt", "vocab_size": 50432}
SIGLIP = {"model_type": "siglip_vision_model"}
CONFIGS: dict[str, dict[str, Any]] = {
    "data/backbones/smollm2-135m-instruct": {
        "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "backbones/mpt-1b-redpajama-200b": {**MPT, "d_model": 2048, "n_heads": 16, "n_layers": 24},
    "mosaicml/mpt-7b": {**MPT, "d_model": 4096, "n_heads": 32, "n_layers": 32},
    "togethercomputer/RedPajama-INCITE-Base-3B-v1": {
        "model_type": "gpt_neox", "hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32,
        "intermediate_size": 10240, "vocab_size": 50432, "rotary_pct": 1.0, "use_parallel_residual": False,
        "tie_word_embeddings": False,
    },
    "huggyllama/llama-7b": {
        "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "intermediate_size": 11008, "vocab_size": 32000, "tie_word_embeddings": False,
    },
    "lmsys/vicuna-7b-v1.5": {
        "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "intermediate_size": 11008, "vocab_size": 32000, "tie_word_embeddings": False,
    },
    "gpt2": {"model_type": "gpt2"},  # the class's own defaults
    "Qwen/Qwen3-0.6B": {
        **QWEN3, "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16,
        "intermediate_size": 3072, "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-1.7B": {
        **QWEN3, "hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16,
        "intermediate_size": 6144, "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-8B": {
        **QWEN3, "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32,
        "intermediate_size": 12288, "tie_word_embeddings": False,
    },
    "openai/clip-vit-large-patch14-336": {
        "model_type": "clip_vision_model", "hidden_size": 1024, "num_hidden_layers": 24,
        "num_attention_heads": 16, "intermediate_size": 4096, "image_size": 336, "patch_size": 14,
    },
    "google/siglip2-base-patch16-256": {
        **SIGLIP, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072, "image_size": 256, "patch_size": 16,
    },
    "google/siglip2-so400m-patch14-384": {
        **SIGLIP, "hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16,
        "intermediate_size": 4304, "image_size": 384, "patch_size": 14,
    },
}  # fmt: skip


def known_backbones(patch: pytest.MonkeyPatch) -> None:
    """Let transformers find these configs by their names, and no others; image processors by none."""

    def config(name: str, **_: Any) -> PreTrainedConfig:
        if name not in CONFIGS:
            raise OSError(f"{name} is not in the cache")
        fields = dict(CONFIGS[name])
        return AutoConfig.for_model(fields.pop("model_type"), **fields)

    def nothing(name: str, **_: Any) -> None:
        raise OSError(f"{name} is not in the cache")

    patch.setattr(AutoConfig, "from_pretrained", config)
    patch.setattr(AutoImageProcessor, "from_pretrained", nothing)

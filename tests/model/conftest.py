"""Tiny Flamingos with random weights, made in code: a few layers of width 32, pictures of 64 px."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerFast

from flamingo.config import ADDED_TOKENS, FlamingoConfig, FlamingoVisionConfig
from flamingo.modeling import FlamingoForConditionalGeneration

PAD, BOS, EOS = 0, 1, 2
WORDS = 20  # ids that the LM knows; its table is padded to TABLE rows, as tables often are
TABLE = 24
END_OF_CHUNK, IMAGE = WORDS, WORDS + 1
SIDE = 64  # pixels

Build = Callable[..., FlamingoForConditionalGeneration]


def text_config(family: str = "llama", **fields: Any) -> PreTrainedConfig:
    """A causal LM of 4 layers; large weights, so that what goes in matters for what comes out."""
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 48,
        "vocab_size": TABLE,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    return AutoConfig.for_model(family, **{**sizes, **fields})


def config(text: PreTrainedConfig, **architecture: Any) -> FlamingoConfig:
    grid = FlamingoVisionConfig(
        source="timm",
        name="test_efficientnet",
        image_size=SIDE,
        width=256,
        grid=[2, 2],
        mean=[0.3, 0.4, 0.5],
        std=[0.2, 0.3, 0.4],
    )
    small = {
        "resampler_depth": 2,
        "resampler_width": 16,
        "resampler_heads": 2,
        "resampler_head_dim": 8,
        "resampler_latents": 3,
        "cross_attention_every": 2,
        "cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "gate_init": 0.7,
        "initializer_range": 0.3,
    }
    return FlamingoConfig(
        text_config=text,
        vision_config=grid,
        first_added_token_id=WORDS,
        end_of_chunk_token_id=END_OF_CHUNK,
        image_token_id=IMAGE,
        **{**small, **architecture},
    )


@pytest.fixture(scope="session")
def build() -> Build:
    """build(family="llama", lm={fields of its config}, **fields of FlamingoConfig)."""

    def make(family: str = "llama", lm: dict | None = None, **architecture: Any):
        torch.manual_seed(0)
        return FlamingoForConditionalGeneration(
            config(text_config(family, **(lm or {})), **architecture)
        ).eval()

    return make


@pytest.fixture(scope="session")
def model(build: Build) -> FlamingoForConditionalGeneration:
    """A LLaMA that sees, gates open. Shared: tests that change it build their own."""
    return build()


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    """int64[2, 7]: three images, the second row has text first."""
    i = IMAGE
    return torch.tensor([[i, 5, 6, i, 7, 8, END_OF_CHUNK], [9, 10, i, 11, 12, 13, 14]])


@pytest.fixture(scope="session")
def pixels() -> torch.Tensor:
    """float[3, 3, 64, 64]: the pictures of `ids`."""
    return torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, the ids as in the models; without the added tokens."""
    names = ["<pad>", "<s>", "</s>", *"abcdefghijklmnopq"]
    assert len(names) == WORDS
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture
def seeing_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """With <|endofchunk|> and <image>."""
    tokenizer.add_special_tokens({"additional_special_tokens": list(ADDED_TOKENS)})
    return tokenizer

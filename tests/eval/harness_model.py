"""A tiny model folder that harnesses load, and pictures for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from PIL import Image, ImageFile
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, PreTrainedTokenizerFast

from flamingo.config import ADDED_TOKENS, FlamingoConfig, FlamingoVisionConfig
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.processing import FlamingoProcessor

TEXTS = (
    "Question: what color is the shape? Answer: red blue green yes no circle",
    "\n\n",
    "What's this? a b",
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that every text is tokens and blanks belong to words."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    bpe.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<pad>", "</s>"]
    )
    bpe.train_from_iterator(TEXTS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="</s>")


def write_model(folder: Path, **architecture: Any) -> Path:
    """A LLaMA of 2 layers with random weights and open gates: pictures matter to what it says.

    architecture: more fields of the config.
    """
    words = tokenizer()
    first = len(words)
    words.add_special_tokens({"additional_special_tokens": list(ADDED_TOKENS)})
    torch.manual_seed(0)
    text = AutoConfig.for_model(
        "llama",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=first,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    config = FlamingoConfig(
        text_config=text,
        vision_config=FlamingoVisionConfig(
            source="timm", name="test_efficientnet", image_size=64, width=256, grid=[2, 2]
        ),
        first_added_token_id=first,
        end_of_chunk_token_id=words.convert_tokens_to_ids(ADDED_TOKENS[0]),
        image_token_id=words.convert_tokens_to_ids(ADDED_TOKENS[1]),
        resampler_depth=1,
        resampler_width=16,
        resampler_heads=2,
        resampler_head_dim=8,
        resampler_latents=3,
        cross_attention_every=1,
        cross_attention_heads=2,
        cross_attention_head_dim=8,
        gate_init=0.9,
        initializer_range=0.3,
        **architecture,
    )
    model = FlamingoForConditionalGeneration(config).eval()
    with torch.no_grad():  # or all it says is one token again and again
        for parameter in model.language_model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.5)
    model.save_pretrained(folder)
    FlamingoProcessor.for_model(config, words).save_pretrained(folder)
    return folder


@contextmanager
def other_tests_untouched() -> Iterator[None]:
    """lmms-eval changes libraries for its whole process: cut-off pictures pass, and locks are shared."""
    lock = type(FileLock)
    cut_off, call = ImageFile.LOAD_TRUNCATED_IMAGES, lock.__call__
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = cut_off
        lock.__call__ = call


def picture(number: int) -> Image.Image:
    """Two colours, another pair for each number."""
    image = Image.new("RGB", (64, 48), ((number * 67) % 256, (number * 131) % 256, (number * 29) % 256))
    image.paste(((number * 17) % 256, 200, (number * 91) % 256), (8, 8, 40, 32))
    return image

"""A tiny Flamingo and batches made by hand, for this process and for others."""

from __future__ import annotations

import torch
from transformers import AutoConfig

from flamingo.config import FlamingoConfig, FlamingoVisionConfig
from flamingo.data.batch import IGNORE, Batch
from flamingo.modeling import FlamingoForConditionalGeneration

WORDS = 20
END_OF_CHUNK, IMAGE = WORDS, WORDS + 1


def tiny_model(spread: float = 0.3, **architecture) -> FlamingoForConditionalGeneration:
    """LLaMA of 2 layers, gates open, in training mode. spread: of its random weights; architecture:
    more fields of the config."""
    torch.manual_seed(0)
    text = AutoConfig.for_model(
        "llama",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=WORDS,
        initializer_range=spread,
    )
    config = FlamingoConfig(
        text_config=text,
        vision_config=FlamingoVisionConfig(
            source="timm", name="test_efficientnet", image_size=64, width=256, grid=[2, 2]
        ),
        first_added_token_id=WORDS,
        end_of_chunk_token_id=END_OF_CHUNK,
        image_token_id=IMAGE,
        resampler_depth=1,
        resampler_width=16,
        resampler_heads=2,
        resampler_head_dim=8,
        resampler_latents=3,
        cross_attention_every=1,
        cross_attention_heads=2,
        cross_attention_head_dim=8,
        gate_init=0.7,
        initializer_range=spread,
        **architecture,
    )
    return FlamingoForConditionalGeneration(config).train()


def _row(number: int, words: int, images: int) -> tuple[list[int], list[int]]:
    text = torch.randint(3, WORDS, (words,), generator=torch.Generator().manual_seed(number))
    ids = [IMAGE] * images + text.tolist() + [END_OF_CHUNK]
    learned = words // 2
    return ids, [IGNORE] * (len(ids) - learned) + ids[len(ids) - learned :]


def make_batch(words: list[int], images: list[int], first: int = 0, side: int = 64) -> Batch:
    """make_batch([6, 4], images=[1, 0]): rows of so many words after so many pictures.

    Loss on the second half of each row. A row is the same in whatever batch it stands.
    """

    numbers = range(first, first + len(words))
    rows = [_row(*fields) for fields in zip(numbers, words, images, strict=True)]
    longest = max(len(ids) for ids, _ in rows)

    def pad(values: list[int], fill: int) -> list[int]:
        return values + [fill] * (longest - len(values))

    keys = [
        f"picture {number}.{i}" for number, count in zip(numbers, images, strict=True) for i in range(count)
    ]
    pictures = [
        torch.randn(3, side, side, generator=torch.Generator().manual_seed(sum(key.encode()))) for key in keys
    ]
    return Batch(
        input_ids=torch.tensor([pad(ids, 0) for ids, _ in rows]),
        attention_mask=torch.tensor([pad([1] * len(ids), 0) for ids, _ in rows]),
        labels=torch.tensor([pad(labels, IGNORE) for _, labels in rows]),
        pixel_values=torch.stack(pictures) if pictures else torch.zeros(0, 3, side, side),
        pixel_index=torch.arange(len(keys)),
        image_keys=keys,
        keys=[f"document {number}" for number in numbers],
    )

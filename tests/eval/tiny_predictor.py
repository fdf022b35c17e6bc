"""A predictor of a tiny model with random weights, prompts for it, and what they must give."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flamingo.config import ADDED_TOKENS
from flamingo.eval.benchmarks import Example
from flamingo.eval.few_shot import Prompt
from flamingo.eval.predictor import Predictor
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.processing import FlamingoProcessor
from tests.model.conftest import config, text_config

# LMs that know where tokens are in different ways.
LMS = {
    "rotary": ("llama", {"num_key_value_heads": 2}),
    "learned": ("gpt2", {}),
    "from the mask": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.1}),
    "distances": (
        "mpt",
        {"d_model": 32, "n_heads": 4, "n_layers": 4, "use_cache": True, "initializer_range": 0.3},
    ),
    "sliding": (
        "qwen3",
        {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
        },
    ),
}
WORDS = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n", "o", "p", "q"]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word."""
    ids = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *WORDS])}
    words = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    made.add_special_tokens({"additional_special_tokens": list(ADDED_TOKENS)})
    return made


def tiny(family: str = "llama", lm: dict | None = None, **architecture) -> FlamingoForConditionalGeneration:
    torch.manual_seed(0)
    fields = {"initializer_range": 0.1, **(lm or {})}  # rounding stays below 1e-5
    model = FlamingoForConditionalGeneration(config(text_config(family, **fields), **architecture)).eval()
    with torch.no_grad():
        model.added_tokens.output *= 0.5  # or random weights end most answers before they begin
    return model


def predictor(model: FlamingoForConditionalGeneration, **options) -> Predictor:
    return Predictor.of(model, FlamingoProcessor.for_model(model.config, tokenizer()), **options)


def draw_pictures(folder: Path, count: int) -> list[Path]:
    """Noise, so that each looks different to random weights."""
    paths = [folder / f"{i}.png" for i in range(count)]
    for i, path in enumerate(paths):
        noise = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(i))
        Image.fromarray(noise.to(torch.uint8).numpy()).save(path)
    return paths


def ask(text: str, *images: Path | None, shots: tuple[tuple[str, Path | None], ...] = ()) -> Prompt:
    """A query about its pictures, after shots of a text and a picture."""
    prefix = "".join(f"<image>{said}<|endofchunk|>" for said, _ in shots)
    example = Example(f"{prefix}{text}{images}", images[0] or Path("blank") if images else Path("none"))
    return Prompt(example, prefix, tuple(image for _, image in shots), "<image>" * len(images) + text, images)


def fed(asked: Predictor, prompt: Prompt) -> dict:
    """What the model takes for one prompt alone, as a whole."""
    ids = asked.processor.tokenizer(prompt.prefix + prompt.text, return_tensors="pt")["input_ids"]  # type: ignore
    images = [*prompt.prefix_images, *prompt.images]
    pixels = torch.stack([asked.pixels(image) for image in images]) if images else None
    return {"input_ids": ids, "pixel_values": pixels}


def alone(asked: Predictor, prompt: Prompt, **options) -> str:
    """What transformers generates for one prompt, without any cache."""
    given = fed(asked, prompt)
    options = {"max_new_tokens": asked.max_new_tokens, "do_sample": False, "use_cache": False, **options}
    out = asked.model.generate(**given, attention_mask=torch.ones_like(given["input_ids"]), **options)
    new = out[0, given["input_ids"].shape[1] :]
    return asked.processor.tokenizer.decode(new, skip_special_tokens=True)  # type: ignore[attr-defined]


class Passes:
    """Rows and tokens of each pass through the LM."""

    def __init__(self, model: FlamingoForConditionalGeneration):
        self.shapes: list[tuple[int, int]] = []
        model.get_input_embeddings().register_forward_hook(
            lambda module, args, out: self.shapes.append(tuple(args[0].shape))
        )

"""One prompt, some pictures, one answer: what `flamingo generate` does."""

from __future__ import annotations

from pathlib import Path

import torch

from flamingo.data.transforms import decode_image
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.processing import IMAGE, FlamingoProcessor
from flamingo.runtime import tune_cpu


def load_model(folder: Path) -> FlamingoForConditionalGeneration:
    """The model of a folder, on a GPU if there is one. Raises ValueError where there is none."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no model (no config.json): train one, or name its folder")
    model = FlamingoForConditionalGeneration.from_pretrained(folder).eval()
    return model.to("cuda") if torch.cuda.is_available() else model  # type: ignore[arg-type]


def answer(folder: Path, prompt: str, images: list[Path], max_new_tokens: int = 32) -> str:
    """The model's greedy answer.

    Raises ValueError for a folder without a model, a picture that is missing or damaged, or
    pictures and <image> tokens that differ in number.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no model (no config.json): train one, or name its folder")
    pictures = []
    for path in images:
        try:
            pictures.append(decode_image(path.read_bytes()))
        except (OSError, ValueError) as error:
            raise ValueError(f"picture {path} cannot be read: {error}") from None
    if IMAGE not in prompt:
        prompt = IMAGE * len(pictures) + prompt
    tune_cpu()
    processor = FlamingoProcessor.from_pretrained(folder)
    inputs = processor(text=prompt, images=pictures)
    model = FlamingoForConditionalGeneration.from_pretrained(folder).eval()
    if torch.cuda.is_available():
        model.to("cuda")  # type: ignore[arg-type]
    out = model.generate(**inputs.to(model.device), max_new_tokens=max_new_tokens, do_sample=False)
    new = out[0, inputs["input_ids"].shape[1] :]  # type: ignore[index]
    return processor.tokenizer.decode(new, skip_special_tokens=True).strip()  # type: ignore[attr-defined]

"""One prompt, some pictures, one answer: what `flamingo generate` does."""

from __future__ import annotations

from pathlib import Path

from flamingo.attention import attend_plainly
from flamingo.data.transforms import decode_image
from flamingo.folders import check_model, load_model
from flamingo.processing import IMAGE, FlamingoProcessor
from flamingo.runtime import tune_cpu


def answer(folder: Path, prompt: str, images: list[Path], max_new_tokens: int = 32) -> str:
    """The model's greedy answer.

    Raises ValueError for a folder without a model, a picture that is missing or damaged, or
    pictures and <image> tokens that differ in number.
    """
    check_model(folder)
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
    model = load_model(folder)
    attend_plainly(model.language_model)
    out = model.generate(**inputs.to(model.device), max_new_tokens=max_new_tokens, do_sample=False)
    new = out[0, inputs["input_ids"].shape[1] :]  # type: ignore[index]
    return processor.tokenizer.decode(new, skip_special_tokens=True).strip()  # type: ignore[attr-defined]

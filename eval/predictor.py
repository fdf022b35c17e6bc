"""Prompts -> generated answers: each picture encoded once, batches of equal length.

N images, L latents, W resampler width, B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from flamingo.attention import attend_plainly
from flamingo.data.transforms import decode_image
from flamingo.eval.few_shot import Prompt
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.processing import FlamingoProcessor

ENCODE_CHUNK = 32  # pictures that the encoder takes at a time


class Predictor:
    """Greedy generation for many prompts. Latents are kept, so no picture is encoded twice."""

    def __init__(self, folder: str | Path, max_new_tokens: int = 5, tokens_per_batch: int = 2048):
        self.processor = FlamingoProcessor.from_pretrained(folder)
        self.model = FlamingoForConditionalGeneration.from_pretrained(folder).eval()
        if torch.cuda.is_available():
            self.model.to("cuda")  # type: ignore[arg-type]
        attend_plainly(self.model.language_model)
        self.max_new_tokens, self.tokens_per_batch = max_new_tokens, tokens_per_batch
        self.latents: dict[Path | None, Tensor] = {}

    def predict(self, prompts: Iterable[Prompt]) -> Iterator[tuple[Prompt, str]]:
        """(prompt, answer) pairs, batch by batch, shortest prompts first."""
        tokenizer = self.processor.tokenizer  # type: ignore[attr-defined]
        prompts = list(prompts)
        ids = tokenizer([p.text for p in prompts], add_special_tokens=False)["input_ids"] if prompts else []
        rows = sorted(zip(ids, prompts, strict=True), key=lambda row: len(row[0]))
        for batch in self._batches(rows):
            yield from zip([p for _, p in batch], self._answers(batch), strict=True)

    def _batches(self, rows: list[tuple[list[int], Prompt]]) -> Iterator[list]:
        """Rows of one length together, so that nothing is computed for padding."""
        batch: list[tuple[list[int], Prompt]] = []
        for row in rows:
            full = (len(batch) + 1) * len(row[0]) > self.tokens_per_batch
            if batch and (full or len(row[0]) != len(batch[0][0])):
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    @torch.inference_mode()
    def _answers(self, batch: list[tuple[list[int], Prompt]]) -> list[str]:
        input_ids = torch.tensor([ids for ids, _ in batch], device=self.model.device)
        images = [image for _, prompt in batch for image in prompt.images]
        out = self.model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            media=self.model.media(latents=self._encode(images)) if images else None,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
        )
        new = out[:, input_ids.shape[1] :]  # type: ignore[index]
        texts = self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)  # type: ignore[attr-defined]
        return [text.strip() for text in texts]

    def _encode(self, images: list[Path | None]) -> Tensor:
        """float[N, L, W] of the pictures, in order; new ones go through the encoder, once."""
        new = [image for image in dict.fromkeys(images) if image not in self.latents]
        for start in range(0, len(new), ENCODE_CHUNK):
            part = new[start : start + ENCODE_CHUNK]
            pixels = torch.stack([self.pixels(image) for image in part]).to(self.model.device)
            latents = self.model.resampler(self.model.encode_images(pixels))
            for image, latent in zip(part, latents, strict=True):
                self.latents[image] = latent
        return torch.stack([self.latents[image] for image in images])

    def pixels(self, image: Path | None) -> Tensor:
        """float32[3, S, S]; zeros, the mean colour, for a blank picture."""
        transform = self.processor.image_processor.transform  # type: ignore[attr-defined]
        if image is None:
            return torch.zeros(3, transform.size, transform.size)
        try:
            return transform(decode_image(image.read_bytes()))
        except (OSError, ValueError) as error:
            raise ValueError(f"picture {image} cannot be read: {error}") from None

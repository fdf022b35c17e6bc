"""Texts with pictures -> answers and likelihoods, for harnesses that bring their own prompts.

B rows, T tokens, M tokens of continuations, N images, L latents, W resampler width, V vocabulary with
the added tokens.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from flamingo import chat
from flamingo.folders import check_model, load_model
from flamingo.processing import IMAGE, FlamingoProcessor
from flamingo.runtime import tune_cpu

# Of generation. `until`: strings that end an answer and are not part of it.
SAMPLING = {"temperature", "top_p", "top_k", "min_p"}
PASSED = {"num_beams", "length_penalty", "early_stopping", "repetition_penalty", "no_repeat_ngram_size"}
OPTIONS = SAMPLING | PASSED | {"until", "do_sample", "max_new_tokens", "min_new_tokens"}
DTYPES = ("auto", "float32", "bfloat16", "float16")
TEMPLATES = {"few_shot": chat.DEFAULT_TEMPLATE, "own": None}
ENCODE_CHUNK = 32  # pictures that the encoder takes at a time


@dataclass(frozen=True)
class Asked:
    """A prompt: text with one <image> for each of its pictures (PIL images, paths or addresses)."""

    text: str
    images: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Said:
    """An answer; given, made: tokens of the prompt and of the answer."""

    text: str
    given: int
    made: int


def placed(text: str, images: int) -> str:
    """The text with as many <image> as pictures: where it says, else before it all.

    A text that has <image> for other reasons keeps the word "image": the token stands for a picture.
    """
    if text.count(IMAGE) == images:
        return text
    return IMAGE * images + text.replace(IMAGE, "image")


def turn_text(content: str | Sequence[dict[str, Any]]) -> str:
    """The text of a turn with <image> where its pictures stand; as `placed` where its texts say so."""
    if isinstance(content, str):
        return content.replace(IMAGE, "image")
    texts = [part["text"] for part in content if part["type"] == "text"]
    images = sum(part["type"] == "image" for part in content)
    if images and "".join(texts).count(IMAGE) == images:
        return "".join(texts)
    words = (IMAGE if part["type"] == "image" else part["text"].replace(IMAGE, "image") for part in content)
    return "".join(words)


def generation_options(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `generate` from a task's; without do_sample, a temperature above 0 means sampling.

    Raises ValueError for numbers of beams or tokens below 1.
    """
    for name in ("num_beams", "max_new_tokens"):
        if int(given.get(name, 1)) < 1:
            raise ValueError(f"gen_kwargs: {name}={given[name]!r}: must be at least 1")
    temperature = float(given.get("temperature") or 0)
    wanted = given.get("do_sample")
    sample = temperature > 0 if wanted is None else bool(wanted) and given.get("temperature") != 0
    options = {name: given[name] for name in (PASSED | {"max_new_tokens", "min_new_tokens"}) & given.keys()}
    if sample:
        options |= {name: given[name] for name in SAMPLING & given.keys()}
    return {**options, "do_sample": sample}


def stops(given: Any) -> list[str]:
    """`until` of a task as a list. Raises ValueError for what is neither text nor a list of texts."""
    found = [given] if isinstance(given, str) else list(given or [])
    if odd := [stop for stop in found if not isinstance(stop, str)]:
        raise ValueError(f"gen_kwargs: until={given!r}: {odd[0]!r} is not text")
    return [stop for stop in found if stop]


class Asker:
    """A model folder that answers, B prompts at a time. Latents of pictures are kept, the last used.

    Raises ValueError for a folder without a model, or a device, dtype or template that is not known.
    """

    def __init__(
        self,
        folder: Path,
        device: str | None = None,
        dtype: str = "auto",
        cached_images: int = 1024,
        chat_template: str = "few_shot",
    ):
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r}: choose one of {', '.join(DTYPES)}")
        if chat_template not in TEMPLATES:
            raise ValueError(f"chat_template={chat_template!r}: choose one of {', '.join(TEMPLATES)}")
        check_model(folder)
        self.device = _device(device)
        tune_cpu(processes=int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        self.processor: Any = FlamingoProcessor.from_pretrained(folder)
        self.tokenizer: Any = self.processor.tokenizer
        self.model: Any = load_model(folder, self.device, dtype)
        self.template = TEMPLATES[chat_template]
        self.cached_images = cached_images
        self.latents: OrderedDict[Any, Tensor] = OrderedDict()

    def close(self) -> None:
        """Gives the memory back; nothing can be asked afterwards."""
        self.latents.clear()
        self.model = None

    def chat(self, turns: Sequence[dict[str, Any]]) -> Asked:
        """A conversation as a prompt: {"role", "content": text, or parts with "type"} for each turn.

        What ends with an assistant's turn is gone on with. Raises ValueError for a part that is
        neither text nor picture.
        """
        images = chat.images_of(list(turns))
        flat = [{"role": turn["role"], "content": turn_text(turn["content"])} for turn in turns]
        begun = bool(flat) and flat[-1]["role"] == "assistant"
        text = self.processor.apply_chat_template(
            flat, chat_template=self.template, add_generation_prompt=not begun, continue_final_message=begun
        )
        return Asked(text, tuple(images))

    # -- answers ---------------------------------------------------------------------------

    @torch.inference_mode()
    def generate(self, asked: Sequence[Asked], given: dict[str, Any]) -> list[Said]:
        """One answer each, cut before the first of the strings in `until`; given: see OPTIONS."""
        until, options = stops(given.get("until")), generation_options(given)
        inputs = self.tokenizer(
            [self.processor.marked(each.text) for each in asked],
            add_special_tokens=False,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(self.device)
        if until:
            options |= {"stop_strings": until, "tokenizer": self.tokenizer}
        out = self.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            media=self._media(asked),
            pad_token_id=self._padding,
            **options,
        )
        made = out[:, inputs["input_ids"].shape[1] :].tolist()
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        return [self._said(row, length, until) for row, length in zip(made, lengths, strict=True)]

    def _said(self, tokens: list[int], given: int, until: list[str]) -> Said:
        ends = {self.model.config.end_of_chunk_token_id, self.tokenizer.eos_token_id}
        end = next((place for place, token in enumerate(tokens) if token in ends), None)
        tokens = tokens[: len(tokens) if end is None else end + 1]
        while tokens and tokens[-1] == self._padding and end is None:
            tokens.pop()
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        for stop in until:
            text = text.partition(stop)[0]
        return Said(text.strip(), given, len(tokens))

    @property
    def _padding(self) -> int:
        padding = self.tokenizer.pad_token_id
        return self.model.config.end_of_chunk_token_id if padding is None else padding

    # -- likelihoods -----------------------------------------------------------------------

    @torch.inference_mode()
    def likelihoods(self, asked: Sequence[tuple[Asked, str]]) -> list[tuple[float, bool]]:
        """(log-probability of a continuation after its prompt, whether each of its tokens is the
        likeliest) of each pair. Raises ValueError for a continuation without tokens.
        """
        rows = [self._split(prompt.text, continuation) for prompt, continuation in asked]
        longest = max(len(ids) for ids, _ in rows)
        # Padded on the right: what comes after a token changes nothing of it.
        input_ids = torch.full((len(rows), longest), self._padding)
        mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, -100)
        for row, (ids, start) in enumerate(rows):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = 1
            labels[row, start : len(ids)] = input_ids[row, start : len(ids)]
        out = self.model(
            input_ids=input_ids.to(self.device),
            attention_mask=mask.to(self.device),
            media=self._media([prompt for prompt, _ in asked]),
            labels=labels.to(self.device),
            reduction="none",
        )
        counts = [len(ids) - start for ids, start in rows]
        nll = out.loss.float().cpu().split(counts)
        likeliest = rearrange(out.logits, "1 m v -> m v").argmax(dim=-1).cpu()
        greedy = (likeliest == labels[labels != -100]).split(counts)
        return [(-float(n.sum()), bool(g.all())) for n, g in zip(nll, greedy, strict=True)]

    def _split(self, prompt: str, continuation: str) -> tuple[list[int], int]:
        """Tokens of both together, as in training, and where the continuation begins among them."""
        spaces = len(prompt) - len(prompt.rstrip())
        if spaces:  # a token of a word holds the space before it
            prompt, continuation = prompt[:-spaces], prompt[-spaces:] + continuation
        alone, whole = self.processor.token_ids([prompt, prompt + continuation])
        pairs = zip(alone, whole)
        start = next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(alone), len(whole)))
        if start == len(whole):
            raise ValueError(f"continuation {continuation!r} after {prompt[-40:]!r} has no token")
        if not start:  # what comes first is predicted from something
            first = self.tokenizer.bos_token_id
            return [self.model.config.end_of_chunk_token_id if first is None else first, *whole], 1
        return whole, start

    # -- pictures --------------------------------------------------------------------------

    def _media(self, asked: Sequence[Asked]) -> Any:
        """The pictures of all rows, as the gated blocks take them; None without any."""
        images = [image for each in asked for image in each.images]
        return self.model.media(latents=self._encode(images)) if images else None

    def _encode(self, images: list[Any]) -> Tensor:
        """float[N, L, W]; pictures that are not kept go through the encoder, each once."""
        keys = [_key(image) for image in images]
        new = {key: image for key, image in zip(keys, images) if key not in self.latents}
        fresh = list(new.items())
        for start in range(0, len(fresh), ENCODE_CHUNK):
            part = fresh[start : start + ENCODE_CHUNK]
            pixels = torch.cat([self._pixels(image) for _, image in part]).to(self.device)
            latents = self.model.resampler(self.model.encode_images(pixels))
            # Copies: a slice would hold the memory of all.
            self.latents.update((key, own.clone()) for (key, _), own in zip(part, latents, strict=True))
        for key in keys:
            self.latents.move_to_end(key)
        found = torch.stack([self.latents[key] for key in keys])
        while len(self.latents) > self.cached_images:
            self.latents.popitem(last=False)
        return found

    def _pixels(self, image: Any) -> Tensor:
        """float32[1, 3, S, S]."""
        try:
            return self.processor.image_processor([image])["pixel_values"]
        except (OSError, ValueError) as error:
            name = f"of {image.size} pixels" if isinstance(image, Image.Image) else image
            raise ValueError(f"picture {name} cannot be read: {error}") from None


def _device(name: str | None) -> torch.device:
    """Of this process. Raises ValueError for a device that torch does not know, or that is not there."""
    if name in (None, "auto"):
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(str(name))
    except RuntimeError:
        raise ValueError(f"device={name!r}: write cpu, cuda or cuda:0") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name!r}: this machine has no GPU that torch can use; write cpu")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return device


def _key(image: Any) -> Any:
    """The same for the same picture: a path or an address, or a digest of what a picture holds."""
    if not isinstance(image, Image.Image):
        return str(image)
    digest = hashlib.blake2b(repr((image.mode, image.size, image.getpalette())).encode(), digest_size=16)
    digest.update(repr((image.info.get("transparency"), image.info.get("exif"))).encode())
    digest.update(image.tobytes())
    return digest.digest()

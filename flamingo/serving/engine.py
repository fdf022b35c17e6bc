"""A model that answers, word by word, and tells where it looked. One answer at a time.

T prompt tokens, A tokens of an answer, N pictures.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from flamingo.folders import check_model, load_model
from flamingo.fusions import positions
from flamingo.looking import LookingWord, word_maps
from flamingo.processing import FlamingoProcessor
from flamingo.runtime import tune_cpu
from flamingo.serving.prompt import Prompt, Sampling


@dataclass(frozen=True)
class Answer:
    """What has been said so far; ids: its A tokens."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Gate:
    """How far a gated block is open, in 0..1: |tanh| of its gates (their mean, where each channel
    has its own); layer: the LM's layer before which it stands."""

    layer: int
    attention: float
    feed_forward: float


class Engine:
    """The model of a folder, ready to answer on a GPU or a CPU.

    Raises ValueError for a folder that holds no model of ours.
    """

    def __init__(self, folder: Path) -> None:
        check_model(folder)
        tune_cpu()
        self.processor: Any = FlamingoProcessor.from_pretrained(folder)
        self.model: Any = load_model(folder)
        self._turn = threading.Lock()

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def room(self) -> int | None:
        """Tokens that the LM can read, prompt and answer together; None: no limit is known."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def inputs(self, prompt: Prompt, max_new_tokens: int = 1) -> Any:
        """What the model takes: input_ids int64[1, T], pixel_values float32[N, 3, S, S].

        Raises ValueError for a prompt that leaves the LM no room for so many new tokens.
        """
        self.check_room(self.length(prompt), max_new_tokens)
        inputs = self.processor(text=prompt.text, images=list(prompt.pictures) or None)
        return inputs.to(self.model.device)

    def length(self, prompt: Prompt) -> int:
        """Tokens of a prompt as the LM reads it; of a picture those that stand for it."""
        (ids,) = self.processor.token_ids([prompt.text])
        return len(ids) + (self.model.image_tokens - 1) * len(prompt.pictures)

    def check_room(self, length: int, max_new_tokens: int) -> None:
        """Raises ValueError where the LM cannot read so many tokens of prompt and answer."""
        if self.room is not None and length + max_new_tokens > self.room:
            raise ValueError(
                f"the prompt has {length} tokens and the answer may have {max_new_tokens}: this model reads "
                f"{self.room} together; shorten the prompt, or lower max_new_tokens"
            )

    def answer(self, prompt: Prompt, sampling: Sampling | None = None) -> Answer:
        """The whole answer. Raises ValueError as `inputs`."""
        return list(self.stream(prompt, sampling))[-1]

    def stream(self, prompt: Prompt, sampling: Sampling | None = None) -> Iterator[Answer]:
        """The answer as it grows, at least once; with beam search only when it is whole.

        Others that ask meanwhile wait. Closing the iterator ends the generation. Raises ValueError
        as `inputs`.
        """
        sampling = sampling or Sampling()
        with self._turn:
            inputs = self.inputs(prompt, sampling.max_new_tokens)
            if sampling.temperature > 0 and sampling.seed is not None:
                torch.manual_seed(sampling.seed)
            if sampling.num_beams > 1:
                out = self.model.generate(**inputs, **sampling.arguments())
                yield self._said(out[0, inputs["input_ids"].shape[1] :].tolist(), whole=True)
                return
            ids: list[int] = []
            for token in _tokens(
                lambda **more: self.model.generate(**inputs, **sampling.arguments(), **more)
            ):
                ids.append(token)
                yield self._said(ids, whole=False)
            yield self._said(ids, whole=True)

    def looks(self, prompt: Prompt, ids: Sequence[int]) -> list[LookingWord]:
        """Every word of an answer (`Answer.ids`) with where it looked on each picture.

        Raises ValueError as `inputs`, for prompt and answer together.
        """
        with self._turn:
            inputs = self.inputs(prompt, len(ids))
            empty = torch.empty(0, device=self.model.device)
            asked = inputs["input_ids"][0].tolist()
            words = word_maps(self.model, self.tokenizer, asked, ids, inputs.get("pixel_values", empty))
        return [word for word in words if word.word]

    def gates(self) -> list[Gate]:
        """Of every gated block, from the lowest on; of a model without any (`fusion="prefix"`) none."""
        blocks = zip(positions(self.model.config), self.model.gated_blocks, strict=False)
        return [Gate(layer, _open(block.attn_gate), _open(block.ff_gate)) for layer, block in blocks]

    def _said(self, ids: Sequence[int], whole: bool) -> Answer:
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        if not whole:  # the first bytes of a character that is not there yet
            text = text.rstrip("\ufffd")
        return Answer(text.strip(), tuple(ids))


def _open(gate: torch.Tensor) -> float:
    return float(gate.detach().float().tanh().abs().mean())


class _Handed(BaseStreamer):
    """Puts every new token into a queue; the first call brings the prompt."""

    def __init__(self, queue: SimpleQueue) -> None:
        self.queue, self.asked = queue, False

    def put(self, value: torch.Tensor) -> None:
        if self.asked:
            for token in value.flatten().tolist():
                self.queue.put(token)
        self.asked = True

    def end(self) -> None:
        pass


class _Told(StoppingCriteria):
    """Ends a generation that nobody reads any more."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


def _tokens(generate: Callable[..., Any]) -> Iterator[int]:
    """The tokens of a generation that runs beside; its errors are raised here."""
    queue: SimpleQueue = SimpleQueue()
    enough = threading.Event()

    def run() -> None:
        try:
            generate(streamer=_Handed(queue), stopping_criteria=StoppingCriteriaList([_Told(enough)]))
            queue.put(None)
        except BaseException as error:  # raised where the answer is read
            queue.put(error)

    thread = threading.Thread(target=run, name="generate", daemon=True)
    thread.start()
    try:
        while (token := queue.get()) is not None:
            if isinstance(token, BaseException):
                raise token
            yield token
    finally:
        enough.set()
        thread.join()

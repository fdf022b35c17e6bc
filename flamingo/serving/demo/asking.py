"""A question of the page from its click to its words. Knows nothing of the page's library."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL.Image import Image

from flamingo.fusions import positions
from flamingo.looking import LookingWord
from flamingo.serving.demo.limits import Limits
from flamingo.serving.demo.markup import looks_html
from flamingo.serving.demo.overlay import reduced, scale_of
from flamingo.serving.demo.turns import Turn, prompt_of
from flamingo.serving.engine import Answer, Engine
from flamingo.serving.prompt import Sampling

REMEMBERED = 10_000  # sessions


@dataclass(frozen=True)
class Told:
    """A finished answer: its words, and small pictures to draw where they looked."""

    words: tuple[LookingWord, ...] = ()
    pictures: tuple[Image, ...] = ()


@dataclass(frozen=True)
class Update:
    """What the page shows next; told: once the answer is whole, or was stopped."""

    text: str
    status: str = ""
    told: Told | None = None
    error: bool = False


@dataclass
class Asking:
    """The model behind a page, and who wants their answer stopped."""

    engine: Engine
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        self._stopped: dict[str, None] = {}  # in the order of their clicks
        self._lock = threading.Lock()

    def begin(self, session: str) -> None:
        """A new question, which nobody has stopped yet."""
        with self._lock:
            self._stopped.pop(session, None)

    def stop(self, session: str) -> None:
        """End this session's answer, also one that still waits."""
        with self._lock:
            self._stopped[session] = None
            if len(self._stopped) > REMEMBERED:  # sessions that are gone
                self._stopped.pop(next(iter(self._stopped)))

    def ask(self, turns: Sequence[Turn], settings: dict[str, Any], session: str) -> Iterator[Update]:
        """The answer as it grows, then with its words. What cannot be asked is told, not raised."""
        try:
            sampling = self.limits.check_sampling(Sampling(**settings))
            prompt = prompt_of(turns, self.limits)
            self.engine.inputs(prompt, sampling.max_new_tokens)
        except (ValueError, TypeError) as error:
            yield Update("", str(error), error=True)
            return
        answer, stopped = Answer("", ()), session in self._stopped
        if not stopped:
            stream = self.engine.stream(prompt, sampling)
            try:
                for answer in stream:
                    yield Update(answer.text, "answering ...")
                    if stopped := session in self._stopped:
                        break
            finally:
                stream.close()  # type: ignore[attr-defined]
        self.begin(session)
        words = tuple(self.engine.looks(prompt, answer.ids))
        told = Told(words, tuple(reduced(picture) for picture in prompt.pictures))
        yield Update(answer.text, _said(len(answer.ids), sampling.max_new_tokens, stopped, bool(words)), told)

    def look(self, told: Told, number: int) -> str:
        """HTML of where one word of an answer looked. Raises ValueError for a word that is not there."""
        if not 0 <= number < len(told.words):
            raise ValueError(f"word {number} of {len(told.words)}: ask again, and click one of its words")
        crop = self.engine.processor.image_processor.crop
        config = self.engine.model.config
        last_only = bool(positions(config)) and config.attend_to == "immediate"
        return looks_html(told.words[number], told.pictures, crop, scale_of(told.words), last_only)


def _said(tokens: int, most: int, stopped: bool, words: bool) -> str:
    if stopped:
        return f"stopped after {tokens} tokens"
    if not words:
        return "the model ended its answer without a word"
    return f"{tokens} tokens" + (": as many as max_new_tokens allows" if tokens >= most else "")

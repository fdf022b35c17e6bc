"""A conversation about pictures: its turns, how it is asked and what of it still fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL.Image import Image

from flamingo.looking import LookingWord
from flamingo.processing import IMAGE
from flamingo.serving.engine import Answer, Engine
from flamingo.serving.prompt import Prompt, Sampling, open_picture
from flamingo.serving.styles import Message, Style, written


@dataclass(frozen=True)
class Shown:
    """A picture with the name under which it was added."""

    name: str
    picture: Image


@dataclass(frozen=True)
class Turn:
    """A question with the pictures before it, and what was said; prompt: all that was read for it."""

    question: str
    shown: tuple[Shown, ...]
    answer: Answer
    prompt: Prompt
    seen: tuple[Shown, ...]  # the pictures of the prompt


@dataclass
class Chat:
    """Turns that were asked, oldest first, and pictures that wait for the next question."""

    engine: Engine
    style: Style = "few-shot"
    sampling: Sampling = field(default_factory=Sampling)
    turns: list[Turn] = field(default_factory=list)
    waiting: list[Shown] = field(default_factory=list)
    forgotten: int = 0  # of the turns, those that no longer fit

    def add(self, paths: Sequence[Path]) -> None:
        """Pictures of the next question. Raises ValueError, and adds none, where one cannot be read."""
        self.waiting += [Shown(str(path), open_picture(path)) for path in paths]

    def ask(self, question: str) -> Iterator[Answer]:
        """The answer as it grows. Closed early, what was said so far is the answer; before the first
        word, the question was not asked and its pictures wait again.

        Raises ValueError for an empty question, one with `<image>`, or one that is too long by itself.
        """
        if not question.strip():
            raise ValueError("the question is empty: write one")
        if IMAGE in question:
            raise ValueError(f"a question holds {IMAGE}, which stands for a picture: add the picture instead")
        shown = tuple(self.waiting)
        forgotten = self._forgotten(question, shown)
        prompt, seen = self._prompt(question, shown, forgotten)
        self.engine.check_room(self.engine.length(prompt), self.sampling.max_new_tokens)
        self.forgotten = forgotten
        said: Answer | None = None
        stream = self.engine.stream(prompt, self.sampling)
        try:
            for said in stream:
                yield said
        finally:
            stream.close()  # type: ignore[attr-defined]
            if said is not None:
                self.turns.append(Turn(question, shown, said, prompt, seen))
                self.waiting = self.waiting[len(shown) :]

    def undo(self) -> Turn | None:
        """Takes the last turn back; its pictures wait for the next question."""
        if not self.turns:
            return None
        turn = self.turns.pop()
        self.waiting = [*turn.shown, *self.waiting]
        self.forgotten = min(self.forgotten, len(self.turns))
        return turn

    def clear(self) -> None:
        self.turns, self.waiting, self.forgotten = [], [], 0

    def looks(self) -> list[LookingWord]:
        """Of the last answer. Raises ValueError where there is none, or none that saw a picture."""
        if not self.turns:
            raise ValueError("nothing was answered yet: ask first")
        turn = self.turns[-1]
        if not turn.seen:
            raise ValueError("the last answer saw no picture: add one with /image")
        words = self.engine.looks(turn.prompt, turn.answer.ids)
        if not words:
            raise ValueError("the last answer has no words")
        return words

    def _prompt(
        self, question: str, shown: tuple[Shown, ...], forgotten: int
    ) -> tuple[Prompt, tuple[Shown, ...]]:
        messages, seen = [], ()
        for turn in self.turns[forgotten:]:
            messages.append(Message("user", IMAGE * len(turn.shown) + turn.question))
            messages.append(Message("assistant", turn.answer.text))
            seen = (*seen, *turn.shown)
        messages.append(Message("user", IMAGE * len(shown) + question))
        seen = (*seen, *shown)
        text = written(messages, self.style, self.engine.processor)
        return Prompt(text, tuple(each.picture for each in seen)), seen

    def _forgotten(self, question: str, shown: tuple[Shown, ...]) -> int:
        """How many of the oldest turns must go, with their pictures, so that question and answer fit."""
        room = self.engine.room
        for count in range(self.forgotten, len(self.turns)):
            length = self.engine.length(self._prompt(question, shown, count)[0])
            if room is None or length + self.sampling.max_new_tokens <= room:
                return count
        return len(self.turns)

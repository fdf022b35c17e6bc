"""What stands on the page -> the prompt that the model reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from PIL.Image import Image

from flamingo.processing import END_OF_CHUNK
from flamingo.serving.demo.limits import Limits
from flamingo.serving.prompt import Part, Prompt, joined

T = TypeVar("T")


@dataclass(frozen=True)
class Turn:
    """One row of the page. An answer makes it an example; text and picture may be missing."""

    text: str = ""
    picture: Image | None = None
    answer: str = ""

    @property
    def empty(self) -> bool:
        return not (self.text.strip() or self.picture or self.answer.strip())


def prompt_of(turns: Sequence[Turn], limits: Limits) -> Prompt:
    """The rows in reading order: picture, text, and an answer that ends as in training.

    Raises ValueError for no text and no picture at all in the last row, too much text or too many
    pictures.
    """
    if not turns or turns[-1].empty:
        raise ValueError("the question is empty: write one, or add a picture to it")
    pictures = sum(turn.picture is not None for turn in turns)
    if pictures > limits.max_pictures:
        raise ValueError(f"{pictures} pictures: this page allows at most {limits.max_pictures}")
    limits.check_text("".join(turn.text + turn.answer for turn in turns))
    parts: list[Part] = []
    for turn in turns:
        parts += [] if turn.picture is None else [turn.picture]
        # Blanks at the end are tokens of their own, which no question ended with in training.
        text = turn.text.strip()
        if answer := turn.answer.strip():
            text = f"{text} {answer}{END_OF_CHUNK}".lstrip()
        parts += [text] if text else []
    return joined(parts)


def arranged(rows: Sequence[T], shown: int, action: str, index: int, blank: T) -> tuple[list[T], int]:
    """All rows, and how many of them are shown, after one was added, removed, or moved up or down.

    A move beyond an end changes nothing, nor does adding when all are shown.
    """
    rows = list(rows)
    if action == "add":
        return rows, min(shown + 1, len(rows))
    if not 0 <= index < shown:
        return rows, shown
    if action == "remove":
        return [*rows[:index], *rows[index + 1 :], blank], shown - 1
    other = index + (1 if action == "down" else -1)
    if 0 <= other < shown:
        rows[index], rows[other] = rows[other], rows[index]
    return rows, shown

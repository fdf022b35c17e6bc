"""What stands on the page -> the prompt that the model reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL.Image import Image

from flamingo.processing import END_OF_CHUNK
from flamingo.serving.demo.limits import Limits
from flamingo.serving.prompt import Part, Prompt, joined


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

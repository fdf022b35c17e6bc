"""How the turns of a conversation become one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from flamingo.processing import END_OF_CHUNK, IMAGE

Role = Literal["system", "user", "assistant"]
Style = Literal["few-shot", "template", "plain"]
STYLES: tuple[Style, ...] = get_args(Style)


@dataclass(frozen=True)
class Message:
    """What one side says; text has one `<image>` where each picture stands."""

    role: Role
    text: str


def check_style(style: str) -> Style:
    """Raises ValueError, naming the choices, for one that is not known."""
    for known in STYLES:
        if style == known:
            return known
    raise ValueError(f"style={style!r}: choose one of {', '.join(STYLES)}")


def written(messages: Sequence[Message], style: Style, processor: Any) -> str:
    """The prompt's text, which ends where the answer begins.

    few-shot: a user's text is a question, `<image>Question: TEXT Answer: ANSWER<|endofchunk|>`, as
    models of the quickstart and OpenFlamingo's learned it; template: the processor's chat template, for
    models that learned to follow it; plain: texts as they stand, answers as in few-shot.
    Raises ValueError for messages that the template refuses.
    """
    if style == "template":
        return _templated(messages, processor)
    text = ""
    for message in messages:
        if message.role == "assistant":
            text += f" {message.text.strip()}{END_OF_CHUNK}"
        elif message.role == "user" and style == "few-shot":
            text += _question(message.text)
        else:
            text += message.text
    return text


def _question(text: str) -> str:
    """Pictures before the text stay before it; a text that brings its own `Answer:` stays as it is."""
    rest = text.lstrip()
    pictures = 0
    while rest.startswith(IMAGE):
        rest, pictures = rest[len(IMAGE) :].lstrip(), pictures + 1
    rest = rest.rstrip()
    if not rest.endswith("Answer:"):
        rest = f"Question: {rest} Answer:"
    return IMAGE * pictures + rest


def _templated(messages: Sequence[Message], processor: Any) -> str:
    from jinja2 import TemplateError

    chat = [{"role": message.role, "content": _parts(message.text)} for message in messages]
    try:
        return processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses these messages: {error}") from None


def _parts(text: str) -> list[dict[str, str]]:
    """Texts and pictures in order, as chat templates take them."""
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(text.split(IMAGE)):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts

"""The lines of a file of prompts, checked before anything is asked."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from flamingo.chat import images_of
from flamingo.processing import IMAGE
from flamingo.serving.prompt import Sampling
from flamingo.serving.settings import NAMES, changed, unknown
from flamingo.serving.styles import Message, Role, Style, written

SHOWN = 5  # faults that a message names; the rest are counted


@dataclass(frozen=True)
class Request:
    """One prompt of a file: text with one `<image>` per picture, or messages of which a text is made."""

    id: str | int
    text: str
    messages: tuple[Message, ...]
    pictures: tuple[Path, ...]
    sampling: Sampling

    def prompt(self, style: Style, processor: Any) -> str:
        """Its text. Raises ValueError as `styles.written`, or where that loses pictures."""
        text = written(self.messages, style, processor) if self.messages else self.text
        if (kept := text.count(IMAGE)) != len(self.pictures):
            raise ValueError(f"{len(self.pictures)} pictures, but the chat template places {kept}")
        return text


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text", "image"]
    text: str | None = None
    image: str | None = None
    path: str | None = None


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    role: Role
    content: str | list[_Part]


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    id: str | int | None = None
    prompt: str | None = None
    images: list[str] = []
    messages: list[_Message] | None = None


KEYS = (*_Line.model_fields, *NAMES)


def read_requests(path: Path, sampling: Sampling) -> list[Request]:
    """All prompts of a JSONL file, in order; empty lines count as lines and are left out.

    sampling: what a line may change. Raises ValueError that names the lines at fault: no JSON, keys
    or values that are not known, no prompt, pictures that are not there, ids that come twice.
    """
    found: list[Request] = []
    faults: list[str] = []
    ids: dict[str | int, int] = {}
    there: dict[Path, bool] = {}
    for number, text in _lines(path):
        try:
            request = _request(text, number, path.parent, sampling)
            for picture in request.pictures:
                if not there.setdefault(picture, picture.is_file()):
                    raise ValueError(f"picture {picture} is not there")
            if request.id in ids:
                raise ValueError(f"id {request.id!r} is that of line {ids[request.id]} too")
        except ValueError as error:
            faults.append(f"line {number}: {error}")
            continue
        ids[request.id] = number
        found.append(request)
    if faults:
        more = [f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
        raise ValueError(f"{path}: nothing was asked\n  " + "\n  ".join(faults[:SHOWN] + more))
    if not found:
        raise ValueError(f"{path} holds no prompts: write one JSON object a line")
    return found


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}") from None
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would cut within strings
        if line.strip():
            yield number, line


def _request(text: str, number: int, folder: Path, sampling: Sampling) -> Request:
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise ValueError(f"no JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError('no JSON object: write {"prompt": ..., "images": [...]}')
    for key in raw:
        if key not in KEYS:
            raise ValueError(unknown(key, KEYS, "key"))
    own = {key: raw.pop(key) for key in NAMES if key in raw}
    line = _checked(raw)
    if (line.prompt is None) == (line.messages is None):
        raise ValueError('give "prompt" or "messages", one of them')
    if line.messages is None:
        text, names, messages = _placed(line.prompt or "", line.images), line.images, ()
    else:
        if line.images:
            raise ValueError('"images" go with "prompt"; in "messages" they are parts of type "image"')
        text, names, messages = "", *_told(line.messages)
    for name in names:
        if "://" in name or name.startswith("data:"):
            raise ValueError(f"picture {name[:60]!r} is an address: name a file")
    pictures = tuple(Path(os.path.normpath(folder / name)) for name in names)
    key = number if line.id is None else line.id
    return Request(key, text, messages, pictures, changed(sampling, own, strict=True))


def _checked(raw: dict[str, Any]) -> _Line:
    try:
        return _Line.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{where}={str(first['input'])[:60]!r}: {first['msg']}") from None


def _placed(prompt: str, images: list[str]) -> str:
    if not prompt.strip():
        raise ValueError('"prompt" is empty: write a question')
    if IMAGE not in prompt:
        prompt = IMAGE * len(images) + prompt
    if (wanted := prompt.count(IMAGE)) != len(images):
        raise ValueError(f"{wanted} {IMAGE} in the prompt but {len(images)} images")
    return prompt


def _told(given: list[_Message]) -> tuple[list[str], tuple[Message, ...]]:
    """Names of the pictures, and messages with `<image>` where each stands."""
    if not given or given[-1].role != "user":
        raise ValueError('"messages" must end with one of role "user", which is answered')
    names, messages = [], []
    for message in given:
        text = ""
        parts = [_Part(type="text", text=message.content)] if isinstance(message.content, str) else None
        for part in message.content if parts is None else parts:
            assert isinstance(part, _Part)
            if part.type == "text" and (part.text is None or IMAGE in part.text):
                raise ValueError(f'a part of type "text" has its "text", without {IMAGE}')
            text += IMAGE if part.type == "image" else part.text or ""
            if part.type == "image":
                names += images_of([{"content": [part.model_dump()]}])
        messages.append(Message(message.role, text))
    if not messages[-1].text.strip():
        raise ValueError("the last message is empty: write a question")
    return names, tuple(messages)

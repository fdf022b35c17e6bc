"""Chats as a Flamingo reads them: pictures within text. Knows no other room."""

from __future__ import annotations

from typing import Any

# A user's turn and the answer to it are one chunk, as in training: the text stands as it is, the
# answer ends with <|endofchunk|>. A template for a base LM, which knows no roles.
DEFAULT_TEMPLATE = """\
{%- for message in messages -%}
    {%- set turn = namespace(text='') -%}
    {%- if message['content'] is string -%}
        {%- set turn.text = message['content'] -%}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- set turn.text = turn.text + ('<image>' if part['type'] == 'image' else part['text']) -%}
        {%- endfor -%}
    {%- endif -%}
    {%- if not loop.first and (message['role'] == 'assistant' or loop.previtem['role'] != 'assistant') -%}
        {{- ' ' -}}
    {%- endif -%}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- turn.text | trim + '<|endofchunk|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- turn.text | trim -}}
    {%- endif -%}
{%- endfor -%}
"""


def places_images(template: str) -> bool:
    """Whether a template places images itself; an LM's own knows text only."""
    return "image" in template


def images_of(conversation: list[dict[str, Any]]) -> list[Any]:
    """Pictures, paths or addresses in a conversation, in reading order.

    Raises ValueError for an image part that names none.
    """
    found = []
    for part in _parts(conversation):
        if part["type"] != "image":
            continue
        given = [part[key] for key in ("image", "url", "path") if part.get(key) is not None]
        if "base64" in part:
            given.append(f"data:image/*;base64,{part['base64']}")
        if len(given) != 1:
            raise ValueError(
                f"an image part names {len(given)} pictures: give it one, as image, url, path or base64"
            )
        found += given
    return found


def as_text(conversation: list[dict[str, Any]], image: str) -> list[dict[str, Any]]:
    """The same conversation with a string for each content, `image` where a picture stands.

    Raises ValueError for a part that is neither text nor image.
    """
    flat = []
    for message in conversation:
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            content = "".join(image if p["type"] == "image" else p["text"] for p in _parts([message]))
        flat.append({**message, "content": content})
    return flat


def _parts(conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for message in conversation:
        content = message.get("content")
        for part in content if isinstance(content, (list, tuple)) else []:
            if part.get("type") not in ("text", "image"):
                raise ValueError(f'a part of type {part.get("type")!r}: a turn holds "text" and "image" only')
            found.append(part)
    return found

"""A picture with questions and answers: KEY.jpg (jpeg, png, webp) with KEY.json.

    {"question": "What color is it?", "answers": ["blue", "blue", "navy"]}
    {"questions": [{"question": "...", "answer": "..."}, {"question": "...", "answers": [...]}]}

An answer is a text, or an object with the text under "answer" (as VQAv2 has it). Each question is
a turn: the prompt is read without loss, the answer is learned.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from flamingo.data.document import Document, Image, Item, Text
from flamingo.data.errors import BadSample
from flamingo.data.kinds import _members


class Options(BaseModel):
    """How questions and answers are spelt, and which answer is learned."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str = Field(
        default="Question: {question} Answer:", description="Holds {question}; read, not learned."
    )
    answer: str = Field(default=" {answer}", description="Holds {answer}; learned.")
    between: str = Field(
        default="\n", description="Ends an answer that another question of the same image follows."
    )
    pick: Literal["frequent", "first", "all"] = Field(
        default="frequent",
        description="Which of several answers: the most frequent, the first, or all, a turn for each.",
    )
    image_per_turn: bool = Field(default=False, description="Show the image again before every question.")

    @field_validator("prompt", "answer")
    @classmethod
    def _has_its_field(cls, template: str, info: Any) -> str:
        wanted = "{question}" if info.field_name == "prompt" else "{answer}"
        if wanted not in template:
            raise ValueError(f"must hold {wanted}")
        return template


def read(sample: Mapping[str, bytes], key: str, options: Options = Options()) -> Document:  # noqa: B008
    """The turns of one picture; see the package docstring for the contract."""
    picture = sample[_members.one_of(sample, _members.PICTURES, "image")]
    turns = turns_of(_members.json_object(_members.member(sample, "json")), options)
    image = _members.image(picture)
    items: list[Item] = []
    for number, (question, answer) in enumerate(turns):
        last = options.image_per_turn or number + 1 == len(turns)
        items += _turn(image if options.image_per_turn or not number else None, question, answer, options)
        if not last:  # learned: that an answer ends here
            items[-1] = Text(items[-1].text + options.between)  # type: ignore[union-attr]
    return Document(tuple(items), key)


def _turn(image: Image | None, question: str, answer: str, options: Options) -> list[Item]:
    # Not str.format: a question may hold braces of its own.
    prompt = Text(options.prompt.replace("{question}", question), loss=False)
    spoken = Text(options.answer.replace("{answer}", answer))
    return [prompt, spoken] if image is None else [image, prompt, spoken]


def turns_of(fields: dict[str, Any], options: Options) -> list[tuple[str, str]]:
    """(question, answer) of each turn."""
    listed = fields.get("questions", [fields])
    if not isinstance(listed, list):
        raise BadSample("bad json", f"'questions' must be a list, not {type(listed).__name__}")
    turns = []
    for entry in listed:
        if not isinstance(entry, dict) or "question" not in entry:
            raise BadSample("bad json", f"no 'question' in {str(entry)[:80]}")
        question = _members.text(entry["question"], "'question'").strip()
        answers = _answers(entry)
        if not question or not answers:
            raise BadSample("no text", f"a question without words or without an answer: {question[:80]!r}")
        if options.pick == "frequent":  # of equally frequent ones the first
            answers = [Counter(answers).most_common(1)[0][0]]
        turns += [(question, answer) for answer in (answers if options.pick == "all" else answers[:1])]
    if not turns:
        raise BadSample("no text", "'questions' is empty")
    return turns


def _answers(entry: dict[str, Any]) -> list[str]:
    given = entry.get("answers", [entry["answer"]] if "answer" in entry else [])
    if not isinstance(given, list):
        raise BadSample("bad json", f"'answers' must be a list, not {type(given).__name__}")
    bare = [answer.get("answer") if isinstance(answer, dict) else answer for answer in given]
    return [words for answer in bare if (words := _members.text(answer, "an answer").strip())]


def example() -> dict[str, bytes]:
    turns = [
        {"question": "What color is it?", "answers": ["blue", "navy", "blue"]},
        {"question": "Is it round?", "answer": "no"},
    ]
    return {"png": _members.example_png(), "json": json.dumps({"questions": turns}).encode()}

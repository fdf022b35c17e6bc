"""What is asked: text with pictures between, and how the answer is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL.Image import Image

from flamingo.data.transforms import decode_image
from flamingo.processing import IMAGE

Part = str | Image


@dataclass(frozen=True)
class Prompt:
    """Text with one `<image>` where each picture stands, and the pictures in that order, RGB.

    Raises ValueError for an empty one, or where `<image>`s and pictures differ in number.
    """

    text: str
    pictures: tuple[Image, ...] = ()

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError("the prompt is empty: write a question, or add a picture")
        wanted, given = self.text.count(IMAGE), len(self.pictures)
        if wanted != given:
            raise ValueError(
                f"{wanted} {IMAGE} in the text but {given} pictures: write one {IMAGE} where each stands"
            )


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn. temperature=0: the likeliest token each time (top_p, top_k and seed
    change nothing then); seed: None draws another answer each time; num_beams > 1: beam search.

    Raises ValueError for a value outside its range.
    """

    max_new_tokens: int = 32
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    repetition_penalty: float = 1.0
    num_beams: int = 1
    seed: int | None = field(default=None)

    def __post_init__(self) -> None:
        rules = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "0 (the likeliest) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "0 (all) or more"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0; 1 changes nothing"),
            "num_beams": (self.num_beams >= 1, "at least 1"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)}: must be {rule}")

    def arguments(self) -> dict[str, int | float | bool]:
        """As `generate` of transformers takes them."""
        given: dict[str, int | float | bool] = {
            "max_new_tokens": self.max_new_tokens,
            "repetition_penalty": self.repetition_penalty,
            "num_beams": self.num_beams,
            "do_sample": self.temperature > 0,
        }
        if self.temperature > 0:
            given |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return given


def joined(parts: Sequence[Part]) -> Prompt:
    """The prompt of texts and pictures in reading order.

    Raises ValueError for a text that holds `<image>`: a picture itself stands in its place.
    """
    text = ""
    for part in parts:
        if isinstance(part, str) and IMAGE in part:
            raise ValueError(f"a text holds {IMAGE}, which stands for a picture: add the picture instead")
        text += part if isinstance(part, str) else IMAGE
    return Prompt(text, tuple(part for part in parts if not isinstance(part, str)))


def open_picture(path: Path) -> Image:
    """The picture of a file. Raises ValueError that names the file where it cannot be read."""
    try:
        return decode_image(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"picture {path} cannot be read: {error}") from None

"""Prompts to begin with: coloured shapes as the quickstart's model knows them, drawn in code."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image, ImageDraw

from flamingo.serving.demo.turns import Turn

SIZE = 64  # pixels, as the quickstart's pictures
BACKGROUND = (240, 245, 249)
COLOUR, SHAPE = "Question: what color is the shape? Answer:", "Question: what shape is in the image? Answer:"
CIRCLE = "Question: does the image contain a circle? Answer:"


@dataclass(frozen=True)
class Example:
    """The last turn is the question; those before it have their answers."""

    name: str
    turns: tuple[Turn, ...]


def shape(form: str, colour: str, box: tuple[int, int, int, int] = (18, 20, 46, 44)) -> Image.Image:
    """A circle, rectangle or triangle on a light ground, with smooth edges."""
    big = 4
    picture = Image.new("RGB", (SIZE * big, SIZE * big), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    left, top, right, bottom = (edge * big for edge in box)
    if form == "circle":
        draw.ellipse((left, top, left + bottom - top, bottom), fill=colour)
    elif form == "rectangle":
        draw.rectangle((left, top, right, bottom), fill=colour)
    else:
        draw.polygon([(left, bottom), (right, bottom), ((left + right) / 2, top)], fill=colour)
    return picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def examples(max_pictures: int) -> list[Example]:
    """Those that need no more pictures than are allowed."""
    red, blue, yellow, green = (
        shape("triangle", "red"),
        shape("circle", "blue", (10, 22, 40, 48)),
        shape("rectangle", "yellow", (26, 12, 56, 36)),
        shape("circle", "green", (28, 26, 56, 52)),
    )
    found = [
        Example("What color?", (Turn(COLOUR, blue),)),
        Example("What shape?", (Turn(SHAPE, red),)),
        Example("Is there a circle?", (Turn(CIRCLE, yellow),)),
        Example(
            "Two examples first",
            (Turn(COLOUR, red, "red"), Turn(COLOUR, yellow, "yellow"), Turn(COLOUR, green)),
        ),
    ]
    return [example for example in found if len(example.turns) <= max_pictures]


def card(example: Example) -> Image.Image:
    """Its pictures side by side, on a white ground."""
    pictures = [turn.picture for turn in example.turns if turn.picture is not None]
    space = SIZE // 8
    whole = Image.new("RGB", (3 * (SIZE + space) + space, SIZE + 2 * space), "white")
    left = (whole.width - len(pictures) * (SIZE + space) + space) // 2
    for number, picture in enumerate(pictures):
        whole.paste(picture, (left + number * (SIZE + space), space))
    return whole

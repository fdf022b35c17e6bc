"""A strip of test pictures with question, answer and where the model looked: example.png of a run.

Made to stand in a README: one card with its own light ground, so that it reads on light and dark pages.
Lengths are pixels, half as many again as the strip is shown at, for screens of high density.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from matplotlib import font_manager
from PIL import ImageDraw, ImageFont

from flamingo.eval import charts

NAME = "example.png"
COUNT = 4  # pictures side by side
SIDE = 288  # of a picture's column
GAP, EDGE, RADIUS = 24, 30, 18
QUESTION, ANSWER, NOTE = 22, 27, 19  # heights of letters
LINES = 2  # of a question, longer ones are cut
GROUND, INK, MUTED, RULE = "#fbfaf7", "#1f2328", "#59636e", "#d1d9e0"
CAPTION = "Below each picture: where the model looked when it chose the word (bright: most)."


def write_example(path: Path, entries: Sequence[dict[str, Any]]) -> Path | None:
    """Draw the strip of a gallery's entries (`report.read_gallery`), right answers first.

    Returns None and writes nothing where no entry has an answer.
    """
    chosen = choose(entries)
    if not chosen:
        return None
    _draw(chosen).save(path, format="PNG", optimize=True)
    return path


def choose(entries: Sequence[dict[str, Any]], count: int = COUNT) -> list[dict[str, Any]]:
    """Entries that said something: right before wrong, then those whose kind and answer are new."""
    left = [entry for entry in entries if any(word["word"] for word in entry["words"])]
    chosen: list[dict[str, Any]] = []
    while left and len(chosen) < count:
        kinds = {entry["kind"] for entry in chosen}
        answers = {entry["prediction"] for entry in chosen}
        best = min(
            left, key=lambda e: (e["correct"] is False, e["prediction"] in answers, e["kind"] in kinds)
        )
        chosen.append(best)
        left = [entry for entry in left if entry is not best]
    return chosen


def _draw(entries: Sequence[dict[str, Any]]) -> PIL.Image.Image:
    """RGBA of the whole card."""
    texts = [_wrapped(entry["question"], _font(QUESTION)) for entry in entries]
    line, space = round(QUESTION * 1.35), GAP // 2
    pictures = EDGE + line * max(map(len, texts)) + space
    answers = pictures + SIDE + space
    maps = answers + round(ANSWER * 1.5) + space
    caption = maps + SIDE + space
    caption_lines = _wrapped(CAPTION, _font(NOTE), len(entries) * (SIDE + GAP) - GAP, 9)
    width = 2 * EDGE + len(entries) * (SIDE + GAP) - GAP
    height = caption + round(NOTE * 1.4) * len(caption_lines) + EDGE - space
    card = PIL.Image.new("RGBA", (width, height), (0, 0, 0, 0))
    draw = ImageDraw.Draw(card)
    draw.rounded_rectangle((0, 0, width - 1, height - 1), RADIUS, fill=GROUND, outline=RULE, width=2)
    top = charts.heat_top([_word(entry)["map"] for entry in entries])
    for number, (entry, text) in enumerate(zip(entries, texts, strict=True)):
        left = EDGE + number * (SIDE + GAP)
        for row, words in enumerate(text):
            draw.text((left, EDGE + row * line), words, fill=MUTED, font=_font(QUESTION))
        word, image = _word(entry), _fitted(entry["image"])
        card.paste(image, (left, pictures))
        draw.rectangle((left, pictures, left + image.width - 1, pictures + image.height - 1), outline=RULE)
        said = _wrapped(_said(entry), _font(ANSWER, bold=True), lines=1)
        draw.text((left, answers), said[0], fill=INK, font=_font(ANSWER, bold=True))
        card.paste(charts.overlay(image, np.asarray(word["map"]), top), (left, maps))
    for row, words in enumerate(caption_lines):
        draw.text((EDGE, caption + row * round(NOTE * 1.4)), words, fill=MUTED, font=_font(NOTE))
    return card


def _word(entry: dict[str, Any]) -> dict[str, Any]:
    """The word whose look was the most pointed."""
    return max((word for word in entry["words"] if word["word"]), key=lambda word: float(word["map"].max()))


def _said(entry: dict[str, Any]) -> str:
    """The answer, with the right one where it is not."""
    return entry["prediction"] + (f" (right: {entry['answer']})" if entry["correct"] is False else "")


def _fitted(image: PIL.Image.Image) -> PIL.Image.Image:
    """RGB, its longer side `SIDE`."""
    scale = SIDE / max(image.size)
    mode = PIL.Image.Resampling.BICUBIC if scale > 1 else PIL.Image.Resampling.LANCZOS
    size = [max(1, round(length * scale)) for length in image.size]
    return image.convert("RGB").resize((size[0], size[1]), mode)


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Matplotlib's own font, which is there wherever matplotlib is."""
    weight = "bold" if bold else "normal"
    found = font_manager.findfont(font_manager.FontProperties("DejaVu Sans", weight=weight))
    return ImageFont.truetype(found, size)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int = SIDE, lines: int = LINES) -> list[str]:
    """The text in lines that are no wider than `width`; what does not fit ends in dots."""
    rows = [""]
    for word in text.split():
        longer = f"{rows[-1]} {word}".strip()
        if not rows[-1] or font.getlength(longer) <= width:
            rows[-1] = longer
        else:
            rows.append(word)
    kept = rows[:lines]
    cut = len(rows) > lines
    for number, row in enumerate(kept):
        dots = cut and number == len(kept) - 1
        while len(row) > 1 and font.getlength(row + "…" * dots) > width:
            row, dots = row[:-1].rstrip(), True
        kept[number] = row + "…" * dots
    return kept

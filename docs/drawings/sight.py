"""Which picture each word sees, as `flamingo.media` answers for four rows of words."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from docs.drawings.svg import IMAGES, Drawing
from flamingo.media import Runs, sight

IMAGE, END = "<image>", "<eoc>"
LEFT, CELL, ROW = 92, 46, 20

TWO = f"{IMAGE} a dog . {END} {IMAGE} a cat , no dog . {END}".split()
PACKED = f"{IMAGE} a dog . {END}", f"Look : {IMAGE} two cats . {END}"
PAGE = f"My dog : {IMAGE} and my cat : {IMAGE} good friends".split()


def seen_by(
    words: Sequence[str],
    attend_to: str = "immediate",
    documents: list[int] | None = None,
    ahead: bool = False,
) -> list[list[int]]:
    """The pictures that each word sees, by the functions that the model calls."""
    known = sorted(set(words))
    ids = torch.tensor([[known.index(word) for word in words]])
    segments = None if documents is None else torch.tensor([documents])
    look_ahead = torch.ones_like(ids, dtype=torch.bool) if ahead else None
    seen, since = sight(ids, known.index(IMAGE), attend_to, segments, look_ahead)
    runs = Runs.of(seen, since)
    found: list[list[int]] = [[] for _ in words]
    for run, tokens in enumerate(runs.token):
        images = runs.image[run : run + 1] if runs.images is None else runs.images[run]
        for token in tokens[runs.filled[run]].tolist():
            found[token] = [image for image in images.tolist() if image >= 0]
    return found


def draw() -> Drawing:
    drawing = Drawing("sight", 740, 546)
    first, second = (part.split() for part in PACKED)
    packed = [*first, *second]
    documents = [0] * len(first) + [1] * len(second)
    panels = [
        ("immediate: the picture just before a word (the paper's choice)", TWO, seen_by(TWO), None),
        ("previous: all pictures before it", TWO, seen_by(TWO, "previous"), None),
        ("packed: two documents in one row; none sees the other's", packed,
         seen_by(packed, "previous", documents), documents),
        ("p_next: in training, some documents see the picture that comes next", PAGE,
         seen_by(PAGE, ahead=True), None),
    ]  # fmt: skip
    for place, (title, words, seen, segments) in enumerate(panels):
        _panel(drawing, 6 + 142 * place, title, words, seen, segments)
    return drawing


def _panel(
    drawing: Drawing,
    top: float,
    title: str,
    words: Sequence[str],
    seen: list[list[int]],
    documents: list[int] | None,
) -> None:
    name, _, rest = title.partition(": ")
    drawing.text(0, top + 14, name, bold=True, size=14)
    drawing.text(LEFT, top + 14, rest, "soft")
    drawing.text(LEFT - 10, top + 45, "words", "soft", "end", 12)
    pictures = 0
    for place, word in enumerate(words):
        x = LEFT + CELL * place
        if word == IMAGE:
            drawing.box(x + 1, top + 28, CELL - 2, 25, IMAGES[pictures])
            pictures += 1
            drawing.text(x + CELL / 2, top + 45, f"pic {pictures}", "on", "middle", 12, True)
        else:
            small = 11 if word == END else 12
            drawing.text(x + CELL / 2, top + 45, word, "soft" if word == END else "ink", "middle", small)
    for picture in range(pictures):
        y = top + 60 + (ROW + 3) * picture
        drawing.text(LEFT - 10, y + 14, f"sees pic {picture + 1}", IMAGES[picture], "end", 12, True)
        for place, images in enumerate(seen):
            fill = IMAGES[picture] if picture in images else "cell"
            drawing.box(LEFT + CELL * place + 1, y, CELL - 2, ROW, fill)
    if documents is not None:
        x = LEFT + CELL * documents.index(1)
        drawing.line([(x, top + 24), (x, top + 108)], "ink", 1.6, "4 3")

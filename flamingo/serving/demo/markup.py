"""Pieces of the page as HTML; whatever a person wrote is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL.Image import Image

from flamingo.looking import LookingWord
from flamingo.serving.demo.overlay import HEAT, STRENGTH, dimmed, overlay, places, reduced
from flamingo.serving.engine import Gate

STYLE = """
.picture img { width: 100%; max-width: 190px; border-radius: 6px; display: block; }
.picture .none { border: 1px dashed #999; border-radius: 6px; padding: 34px 8px; text-align: center;
  opacity: .75; max-width: 190px; }
.gr-group, .gr-group .styler { background: var(--block-background-fill); }
.gr-group { border: 1px solid var(--border-color-primary); }
.card { background: white; } .card img { height: 80px; margin: 0 auto; display: block; }
.said-error { color: #b42318; font-weight: 600; } .said { opacity: .85; }
.looks { display: flex; flex-wrap: wrap; gap: 14px; }
.looks figure { margin: 0; flex: 1 1 150px; max-width: 260px; }
.looks img { width: 100%; border-radius: 6px; }
.looks figcaption { font-size: .85em; line-height: 1.35; margin-top: 4px; }
.scale { display: inline-block; width: 130px; height: 10px; border-radius: 5px; margin: 0 8px; }
.gates { border-collapse: collapse; width: 100%; max-width: 640px; }
.gates td, .gates th { padding: 3px 10px 3px 0; text-align: left; font-weight: normal; white-space: nowrap; }
.gates .bar { display: inline-block; height: 10px; background: #c2410c; border-radius: 3px;
  margin-right: 6px; vertical-align: middle; }
#words input { position: absolute; opacity: 0; width: 1px; height: 1px; }
#words label { cursor: pointer; } #words label:focus-within { outline: 2px solid #c2410c; }
"""


def data_uri(picture: Image) -> str:
    """The picture within the page, so that no file of it lies on the server."""
    buffer = io.BytesIO()
    picture.save(buffer, format="jpeg", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def picture_html(thumbnail: Image | None, error: str = "") -> str:
    """A picture of the prompt, or the place for one; error: why the last upload was refused."""
    if thumbnail is None:
        inner = "" if error else '<div class="none">no picture</div>'
    else:
        inner = f'<img src="{data_uri(thumbnail)}" alt="picture of the prompt">'
    refused = f'<div class="said-error" role="alert">{escape(error)}</div>' if error else ""
    return f'<div class="picture">{inner}{refused}</div>'


def card_html(card: Image) -> str:
    """Of the gallery; what is to see is named by the button below."""
    return f'<div class="card"><img src="{data_uri(card)}" alt=""></div>'


def status_html(text: str, error: bool = False) -> str:
    kind = 'class="said-error" role="alert"' if error else 'class="said" role="status"'
    return f"<div {kind}>{escape(text)}</div>" if text else ""


def gates_html(gates: Sequence[Gate]) -> str:
    """A bar for the attention and one for the feed-forward layer of every gated block."""
    rows = "".join(
        f"<tr><td>before layer {gate.layer}</td>"
        + "".join(
            f'<td><span class="bar" style="width:{120 * value:.0f}px"></span>{value:.2f}</td>'
            for value in (gate.attention, gate.feed_forward)
        )
        + "</tr>"
        for gate in gates
    )
    return (
        f"<p>Between the layers of the language model stand {len(gates)} gated blocks, through which "
        "pictures reach it. A gate of 0 is closed: nothing of the block comes through. 1 is wide open.</p>"
        '<table class="gates"><thead><tr><th>block</th><th>gate of its cross-attention</th>'
        f"<th>gate of its feed-forward</th></tr></thead><tbody>{rows}</tbody></table>"
    )


def looks_html(word: LookingWord, pictures: Sequence[Image], crop: str, top: float, last_only: bool) -> str:
    """One word's look on every picture of the prompt.

    last_only: the model's words see nothing but the picture before them.
    """
    if not pictures:
        return "<p>The prompt has no picture: there was nothing to look at.</p>"
    figures = []
    for number, (picture, grid) in enumerate(zip(pictures, word.maps.numpy(), strict=True), 1):
        small, share = reduced(picture), float(grid.sum())
        if share:
            drawn = overlay(small, grid, crop, top)
            peak = float(grid.max()) * places(word)
            told = f"{share:.0%} of the look; at its strongest place {peak:.1f} times an even look"
        else:
            drawn, told = dimmed(small), "not seen by this word"
        figures.append(
            f'<figure data-share="{share:.4f}"><img src="{data_uri(drawn)}" '
            f'alt="where the word looked on picture {number}">'
            f"<figcaption><b>Picture {number}</b>: {told}</figcaption></figure>"
        )
    notes = []
    if last_only and len(pictures) > 1:
        notes.append(
            "In this model a word sees only the last picture before it (attend_to=immediate). "
            "Earlier pictures are dimmed: they reach the answer only through the words of their examples."
        )
    if crop == "center" and any(picture.width != picture.height for picture in pictures):
        notes.append("Of a picture that is not square the model sees the centred square; the rest is dimmed.")
    # As they look over a light picture.
    mixed = [[round(STRENGTH * c + (1 - STRENGTH) * 240) for c in colour] for colour in HEAT]
    stops = ", ".join(f"rgb({red} {green} {blue})" for red, green, blue in mixed)
    scale = (
        f'<p>no look <span class="scale" style="background:linear-gradient(90deg, {stops})"></span> '
        f"{top:.1f} times an even look, or more</p>"
    )
    return (
        f'<p>Where the model looked when it chose <b>{escape(word.word)}</b>:</p><div class="looks">'
        f"{''.join(figures)}</div>{scale}{''.join(f'<p>{note}</p>' for note in notes)}"
    )

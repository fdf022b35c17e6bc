"""Where each generated word looked, on every picture of its prompt.

T prompt tokens, A tokens of an answer, N pictures, h x w places of the encoder's grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from flamingo.media import sight


@dataclass(frozen=True)
class LookingWord:
    """A word as it was generated, with where the model looked when it chose it.

    maps: float32[N, h, w]; all of a word's maps together sum to 1, or are 0 where it saw no
    picture. With `attend_to="immediate"` only the last picture's is not 0.
    """

    word: str
    maps: Tensor


@torch.inference_mode()
def token_maps(model: Any, asked: Sequence[int], answer: Sequence[int], pixel_values: Tensor) -> Tensor:
    """float32[1 + A, N, h, w]: where the prompt's last token and each token of the answer looked.

    The map of position i is that of the choice of token i + 1. asked: T token ids with one
    <image> per picture; pixel_values: float[N, 3, H, W].
    """
    ids = torch.tensor([[*asked, *answer]], device=model.device)
    if not len(pixel_values):
        return torch.zeros(1 + len(answer), 0, *model.config.vision_config.grid)
    maps = model.attention_maps(ids, pixel_values)[0, len(asked) - 1 :]  # [1 + A, P] or [1 + A, N, P]
    if maps.ndim == 2:  # the last picture before each token, which cannot be in the answer
        seen, _ = sight(ids, model.config.image_token_id, model.config.attend_to)
        number = torch.arange(len(pixel_values), device=ids.device)
        own = rearrange(seen[0, len(asked) - 1 :], "t -> t 1") == number  # [1 + A, N]
        maps = rearrange(maps, "t p -> t 1 p") * rearrange(own, "t n -> t n 1")
    rows, _ = model.grid_shape(pixel_values)
    return rearrange(maps, "t n (h w) -> t n h w", h=rows).float().cpu()


def words_of(tokenizer: Any, ids: Sequence[int]) -> list[tuple[str, list[int]]]:
    """The words of generated tokens, each with the places of its tokens."""
    words: list[tuple[str, list[int]]] = []
    before, whole = "", tokenizer.decode(ids, skip_special_tokens=True)
    for place in range(len(ids)):  # the text so far, since a token alone may lose its blank
        now = tokenizer.decode(ids[: place + 1], skip_special_tokens=True)
        # The first bytes of a character that is not there yet; others are none, and stay.
        while now.endswith("\ufffd") and whole[len(now) - 1 : len(now)] != "\ufffd":
            now = now[:-1]
        piece, before = now[len(before) :], now
        if not words or (piece[:1].isspace() and words[-1][0].strip()):
            words.append((piece, [place]))
        else:
            words[-1] = (words[-1][0] + piece, [*words[-1][1], place])
    return [(word.strip(), places) for word, places in words]


def word_maps(
    model: Any, tokenizer: Any, asked: Sequence[int], answer: Sequence[int], pixel_values: Tensor
) -> list[LookingWord]:
    """Every word of an answer with its maps; one of several tokens has the mean of theirs."""
    if not len(answer):
        return []
    maps = token_maps(model, asked, answer, pixel_values)
    return [LookingWord(word, maps[places].mean(0)) for word, places in words_of(tokenizer, answer)]

"""BLEU-1 of captions: see `_bleu`."""

from __future__ import annotations

from flamingo.eval.metrics import _bleu

TITLE = "BLEU-1"
SCALE = _bleu.SCALE
per_sample = _bleu.per_sample
value = _bleu.value_of(1)

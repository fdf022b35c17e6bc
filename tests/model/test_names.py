"""What is said of a name that is not known."""

from __future__ import annotations

import pytest

from flamingo.names import hint

KNOWN = ("resampler_width", "connector_width", "lr")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resampler_widht", "did you mean 'resampler_width'?"),
        ("width", "did you mean 'resampler_width' or 'connector_width'?"),
        ("steps", "known: resampler_width, connector_width, lr"),
        ("t", "known: resampler_width, connector_width, lr"),  # a letter is part of any name
    ],
)
def test_the_nearest_name_is_told_or_all(name, said):
    assert hint(name, iter(KNOWN)) == said

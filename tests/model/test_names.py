"""What is said of a name that is not known."""

from __future__ import annotations

import pytest

from flamingo.names import hint

KNOWN = ("resampler_width", "connector_width", "lr", "shots", "text_only_shots")
ALL = f"known: {', '.join(KNOWN)}"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resampler_widht", "did you mean 'resampler_width'?"),
        ("width", "did you mean 'resampler_width' or 'connector_width'?"),
        ("shot", "did you mean 'shots'?"),  # and not what else it is a part of
        ("resampler_broadness", "did you mean 'resampler_width'?"),
        ("stages", ALL),
        ("t", ALL),  # a letter is part of any name
    ],
)
def test_the_nearest_name_is_told_or_all(name, said):
    assert hint(name, iter(KNOWN)) == said

"""Folders of models are complete or absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from flamingo.written import replacing


def test_what_fails_on_the_way_leaves_nothing_and_the_model_that_was_there(tmp_path: Path) -> None:
    out = tmp_path / "model"
    with replacing(out) as part:
        (part / "config.json").write_text("first")
    with pytest.raises(KeyboardInterrupt), replacing(out) as part:
        (part / "config.json").write_text("second")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (out / "config.json").read_text() == "first"

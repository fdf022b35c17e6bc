"""A run goes on to its next phase only with the weights that the one before left."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from flamingo.train import session
from flamingo.train.group import SharedError
from tests.train.steps import recipe


@pytest.mark.parametrize("found", [None, SimpleNamespace(step=3)])
def test_a_phase_whose_checkpoint_is_damaged_at_once_is_followed_by_none(monkeypatch, found):
    given = recipe(steps=9, unfreeze=[{"part": "embeddings", "start": 6}])
    trainer = mock.Mock()
    monkeypatch.setattr(session, "_phase", mock.Mock())
    monkeypatch.setattr(session, "Trainer", trainer)
    monkeypatch.setattr(session, "newest", lambda recipe, rank: found)
    company: Any = mock.Mock()
    with pytest.raises(SharedError, match="checkpoint of step 6 was damaged right after it was written"):
        session._phases(given, mock.Mock(), mock.Mock(rank=0), company, 1, None)
    trainer.return_value.run.assert_called_once_with(0, 6)

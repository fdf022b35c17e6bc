"""What training writes can be read by whom the umask allows; safetensors alone keeps others out."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from flamingo.checkpoints.trainables import save_trainables
from flamingo.train import checkpoint
from flamingo.train.nonfinite import NonFinite
from flamingo.train.precision import LossScale
from flamingo.written import replacing
from tests.train.tiny import tiny_model

TENSORS = {"a": torch.zeros(3)}


def _folder(place: Path) -> None:
    with replacing(place / "model") as part:
        (part / "config.json").write_text("{}")
        save_file(TENSORS, part / "model.safetensors")


def _trained_part(place: Path) -> None:
    save_trainables(tiny_model(), place / "trained.safetensors")


def _checkpoint(place: Path) -> None:
    checkpoint._write(place, [TENSORS])


def _step_that_is_not_finite(place: Path) -> None:
    batch: Any = SimpleNamespace(keys=["a"], input_ids=torch.zeros(1, 2, dtype=torch.int64))
    watch = NonFinite(place, 5, rank=0)
    watch.note(3, {"x": math.nan}, 1.0, {"x": math.nan}, {"x": [batch]}, LossScale(False))


@pytest.fixture(params=[0o022, 0o007, 0o077], ids=oct)
def umask(request: Any) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("write", [_folder, _trained_part, _checkpoint, _step_that_is_not_finite])
def test_files_of_weights_have_the_rights_that_the_umask_gives(
    write: Callable[[Path], None], umask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint.dist, "get_rank", lambda: 0)
    write(tmp_path)
    found = {path.suffix: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert ".safetensors" in found
    assert set(found.values()) == {0o666 & ~umask}

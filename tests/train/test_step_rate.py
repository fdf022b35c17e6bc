"""`benchmarks.step_rate`: each step is compared with the peak that was measured beside it."""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("benchmarks.step_rate", reason="the benchmarks lie beside the package, in the repository")

from benchmarks import beside_peak, step_rate  # noqa: E402
from flamingo.train.config import read_recipe  # noqa: E402
from flamingo.train.loop import Trainer  # noqa: E402

SIZES = {"tokens": 5, "targets": 2, "images": 1}


def lines(values):
    return "".join(json.dumps(value) + "\n" for value in values)


def test_a_step_waits_for_its_slowest_rank_and_its_data_and_has_the_peak_of_all_ranks(tmp_path):
    for rank in (0, 1):
        held = {"seconds": 1.0 + rank, "peak": 10.0, "flops": 12.0, "pictures": 0}
        beside = [{"step": s, **held} for s in (1, 2, 3)]
        (tmp_path / f"beside-{rank}.jsonl").write_text(lines(beside))
    metrics = [{"version": "1"}, *({"step": s, "data_seconds": 0.5} for s in (1, 2, 3))]
    (tmp_path / "metrics.jsonl").write_text(lines(metrics))
    steps = step_rate.beside(tmp_path, warmup=1)
    assert [(step["step"], step["seconds"], step["peak"]) for step in steps] == [
        (2, 2.5, 20.0),
        (3, 2.5, 20.0),
    ]


def test_the_clock_of_a_step_starts_when_all_ranks_have_measured_their_peak(tmp_path):
    """Else the rank that was done with it first counts its wait for the others."""
    events: list[str] = []

    def heard(what: str, value: Any) -> Any:
        return lambda *_: events.append(what) or value

    trainer: Any = beside_peak.Measured.__new__(beside_peak.Measured)
    trainer.engine, trainer.dataset = mock.Mock(device=torch.device("cpu")), mock.Mock(rank=0)
    trainer.recipe = mock.Mock(autocast="float32", run=tmp_path)
    with (
        mock.patch.object(beside_peak, "peak", heard("peak", 1.0)),
        mock.patch("torch.distributed.barrier", heard("all are here", None)),
        mock.patch.object(beside_peak.time, "perf_counter", heard("clock", 1.0)),
        mock.patch.object(Trainer, "train_step", heard("step", dict.fromkeys(beside_peak.HELD, 1))),
    ):
        trainer.train_step(0, {})
    assert events == ["peak", "all are here", "clock", "step", "clock", "peak"]


def test_a_step_that_encodes_pictures_does_not_count(tmp_path):
    held = {"seconds": 1.0, "peak": 10.0, "flops": 12.0}
    beside = [{"step": s, **held, "pictures": pictures} for s, pictures in ((1, 9), (2, 1), (3, 0))]
    (tmp_path / "beside-0.jsonl").write_text(lines(beside))
    (tmp_path / "metrics.jsonl").write_text(lines({"step": s, "data_seconds": 0.5} for s in (1, 2, 3)))
    assert [step["step"] for step in step_rate.beside(tmp_path, warmup=1)] == [3]


def test_the_share_is_of_the_peak_beside_the_step_and_not_of_the_best():
    fast, slow = ({"flops": 6.0, "seconds": s, "peak": p, **SIZES} for s, p in ((1.0, 12.0), (4.0, 3.0)))
    row = step_rate.row(2, [[fast, slow]])
    assert row["peak_share"] == 0.5
    assert row["seconds_per_step"] == 2.5 and row["fastest"] == 1.0


def test_ranks_are_compared_round_by_round():
    one, two = [[{"seconds": 1.0}], [{"seconds": 4.0}]], [[{"seconds": 2.0}], [{"seconds": 2.0}]]
    assert step_rate.compared(one, two) == {"two_ranks_times_as_fast_as_one": 1.25, "range": [0.5, 2.0]}


def test_every_step_is_logged_whatever_is_set(tmp_path):
    options = Namespace(data=tmp_path, steps=30, set=["log_every=5", "compile=true"])
    recipe = read_recipe(step_rate.RECIPE, step_rate.overrides(options, tmp_path))
    assert recipe.log_every == 1 and recipe.compile

"""One step is the same step whatever splits it: ZeRO stages x ranks x micro-batches."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.train.ranks import in_ranks
from tests.train.steps import gradients_of_all

STAGES, ACCUMULATIONS = (0, 1, 2, 3), (1, 2)


PREFIX = {"vision": "timm:x", "language": "x", "architecture": {"connector": "mlp", "fusion": "prefix"}}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The gradient of one process, one micro-batch, no ZeRO."""
    (found,) = in_ranks(1, tmp_path_factory.mktemp("reference"), gradients_of_all, [{"zero_stage": 0}])
    return found[0]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_gradient_of_a_step_is_that_of_a_single_process(ranks, reference, tmp_path):
    """Sources mixed, packed and not; on the last of three ranks there is no image at all."""
    settings = [
        {"zero_stage": stage, "accumulation": parts, "pack": pack}
        for stage, parts, pack in itertools.product(STAGES, ACCUMULATIONS, (0, 32))
    ]
    # With a section of its own, DeepSpeed adds up the gradients also without ZeRO, as on GPUs.
    settings.append({"zero_stage": 0, "accumulation": 2, "deepspeed": {"memory_breakdown": False}})
    for found in in_ranks(ranks, tmp_path, gradients_of_all, settings):
        for setting, gradients in zip(settings, found, strict=True):
            assert_same(gradients, reference, setting)


def test_so_is_that_of_vectors_in_the_input(tmp_path):
    """Rows grow with their images, and the last of three ranks has none."""
    (found,) = in_ranks(1, tmp_path / "one", gradients_of_all, [{"zero_stage": 0, "model": PREFIX}])
    settings = [
        {"zero_stage": stage, "accumulation": parts, "pack": pack, "model": PREFIX}
        for stage, parts, pack in ((0, 1, 32), (2, 2, 32), (3, 1, 0), (3, 2, 32))
    ]
    for rank in in_ranks(3, tmp_path / "three", gradients_of_all, settings):
        for setting, gradients in zip(settings, rank, strict=True):
            assert_same(gradients, found[0], setting)


def assert_same(gradients: dict, reference: dict, setting: dict) -> None:
    assert gradients.keys() == reference.keys()
    names = reference.keys() - {"norms"}
    off = sum(float((gradients[n] - reference[n]).double().square().sum()) for n in names) ** 0.5
    size = sum(float(reference[n].double().square().sum()) for n in names) ** 0.5
    assert off <= 1e-6 * size, setting
    for name in names:
        largest = float(reference[name].abs().max())
        torch.testing.assert_close(gradients[name], reference[name], atol=1e-5 * largest, rtol=0)
    assert gradients["norms"] == pytest.approx(reference["norms"], rel=1e-4)

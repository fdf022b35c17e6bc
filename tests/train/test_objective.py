"""One objective over many sources: a step does not depend on how its batch was split."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flamingo.data.packing import packed, padded
from flamingo.train.features import FeatureCache
from flamingo.train.objective import Objective

WEIGHTS = {"captions": 1.0, "turns": 0.3}
IMAGE = 21  # id of <image> in the tiny model


@pytest.fixture
def objective(model) -> Objective:
    return Objective(model, WEIGHTS, FeatureCache(model, 0.0), torch.float32)


def passes(batches: dict, pack: int = 0) -> list:
    """One micro-batch of each source as the rows that the objective takes."""
    micro = [batches.get(name) for name in WEIGHTS]
    return packed(micro, pack, IMAGE) if pack else padded(micro)


def gradients(objective) -> dict[str, torch.Tensor]:
    """And ready for the next."""
    named = {n: p for n, p in objective.named_parameters() if p.requires_grad}
    found = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
    assert found.keys() == named.keys()
    objective.zero_grad()
    return found


def targets(batches: dict) -> dict[str, int]:
    return {name: sum(b.n_targets for b in batches.get(name, [])) for name in WEIGHTS}


def counts_of(name: str, count: int) -> dict[str, int]:
    """So many targets in one source, none in the others."""
    return {**dict.fromkeys(WEIGHTS, 0), name: count}


# (words, images) of the rows of a step: rows of different lengths, several images, none.
STEP = {
    "captions": [(6, 1), (3, 1), (9, 1), (5, 1)],
    "turns": [(8, 2), (4, 3), (12, 1), (7, 0)],
}
SPLITS = [
    pytest.param([[0, 1], [2, 3]], id="in two"),
    pytest.param([[0], [1], [2], [3]], id="one by one"),
    pytest.param([[0, 1, 2], [3]], id="unequal"),
]


def split(make_batch, parts: list[list[int]]) -> dict[str, list]:
    """The step's rows as micro-batches: source -> parts."""
    batches = {}
    for offset, (name, rows) in enumerate(STEP.items()):
        batches[name] = [
            make_batch(
                [rows[i][0] for i in part],
                [rows[i][1] for i in part],
                first=10 * offset + part[0],
            )
            for part in parts
        ]
    return batches


def run(objective, batches: dict[str, list], pack: int = 0) -> tuple[float, dict[str, float], dict]:
    """Loss, summed NLL of each source, gradients: summed over micro-batches."""
    counts, loss, sums = targets(batches), 0.0, dict.fromkeys(batches, 0.0)
    for micro in zip(*batches.values(), strict=True):
        part, parts = objective(passes(dict(zip(batches, micro, strict=True)), pack), counts)
        part.backward()
        loss += part.item()
        sums = {name: sums[name] + value for name, value in zip(WEIGHTS, parts.tolist(), strict=True)}
    return loss, sums, gradients(objective)


@pytest.mark.parametrize("parts", SPLITS)
def test_gradients_summed_over_micro_batches_are_those_of_one_batch(objective, make_batch, parts):
    objective.model.double()  # so that rounding hides nothing
    loss, sums, whole = run(objective, split(make_batch, [[0, 1, 2, 3]]))
    loss_parts, sums_parts, summed = run(objective, split(make_batch, parts))
    assert loss_parts == pytest.approx(loss, rel=1e-5)
    assert sums_parts == pytest.approx(sums, rel=1e-5)
    for name in whole:
        torch.testing.assert_close(summed[name], whole[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("pack", [16, 24, 200])
@pytest.mark.parametrize("parts", SPLITS)
def test_packed_rows_give_the_loss_and_the_gradients_of_padded_ones(objective, make_batch, parts, pack):
    """Text-only documents and documents that begin without an image among them."""
    objective.model.double()
    loss, sums, whole = run(objective, split(make_batch, parts))
    packed_loss, packed_sums, summed = run(objective, split(make_batch, parts), pack)
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    assert packed_sums == pytest.approx(sums, rel=1e-5)
    for name in whole:
        torch.testing.assert_close(summed[name], whole[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("pack", [0, 24])
def test_documents_that_look_ahead_have_the_loss_that_they_have_alone(objective, make_batch, pack):
    def loss(batch, ahead: list[bool]) -> float:
        batch = replace(batch, look_ahead=torch.tensor(ahead))
        with torch.no_grad():
            return objective(passes({"turns": batch}, pack), counts_of("turns", 1))[0].item()

    ahead, plain = make_batch([8], [3], first=1), make_batch([5], [2], first=2)
    both = make_batch([8, 5], [3, 2], first=1)
    expected = loss(ahead, [True]) + loss(plain, [False])
    assert loss(both, [True, False]) == pytest.approx(expected, rel=1e-5)
    assert loss(both, [False, False]) != pytest.approx(expected, rel=1e-5)


def test_the_loss_weighs_the_mean_over_the_target_tokens_of_each_source(model, objective, make_batch):
    batches = split(make_batch, [[0, 1, 2, 3]])
    loss, sums, _ = run(objective, batches)
    expected = 0.0
    for name, weight in WEIGHTS.items():
        (batch,) = batches[name]
        out = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            pixel_values=batch.pixel_values,
            labels=batch.labels,
            reduction="none",
        )
        assert len(out.loss) == batch.n_targets
        assert sums[name] == pytest.approx(out.loss.sum().item(), rel=1e-5)
        expected += weight * out.loss.mean().item()
    assert loss == pytest.approx(expected, rel=1e-5)


def test_the_summed_losses_carry_no_graph(objective, make_batch):
    batches = {"captions": make_batch([4], [1])}
    _, sums = objective(passes(batches), counts_of("captions", 2))
    assert not sums.requires_grad and sums.dtype == torch.float64


@pytest.mark.parametrize("images", [[0, 0], [1, 0]])
def test_a_batch_with_or_without_images_gives_every_trained_parameter_a_gradient(
    objective, make_batch, images
):
    """Or the other ranks would wait for it in a collective."""
    batch = make_batch([6, 5], images)
    loss, _ = objective(passes({"captions": batch}), counts_of("captions", batch.n_targets))
    loss.backward()
    found = gradients(objective)  # every trained parameter has one
    assert all(value.isfinite().all() for value in found.values())
    seen = any(value.any() for name, value in found.items() if "resampler" in name)
    assert seen == any(images)


def test_a_batch_without_targets_adds_zero_and_zero_gradients(objective, make_batch):
    batch = make_batch([6], [1])
    batch.labels.fill_(-100)
    loss, sums = objective(passes({"captions": batch}), counts_of("captions", 5))
    loss.backward()
    assert loss.item() == 0.0 and not sums.any()
    assert not any(value.any() for value in gradients(objective).values())


def test_a_step_without_targets_anywhere_is_not_divided_by_zero(objective, make_batch):
    batch = make_batch([6], [1])
    batch.labels.fill_(-100)
    loss, _ = objective(passes({"captions": batch}), counts_of("captions", 0))
    assert loss.item() == 0.0


def test_blank_images_change_the_loss_of_rows_with_images_only(objective, make_batch):
    def loss(batch, blank: bool) -> float:
        with torch.no_grad():
            counts = counts_of("captions", batch.n_targets)
            return objective(passes({"captions": batch}), counts, blank=blank)[0].item()

    seeing, text = make_batch([6, 7], [1, 2]), make_batch([6, 7], [0, 0])
    assert abs(loss(seeing, blank=True) - loss(seeing, blank=False)) > 1e-3
    assert loss(text, blank=True) == loss(text, blank=False)


def test_a_blank_image_is_the_mean_colour(model, objective, make_batch):
    batch = make_batch([6, 7], [1, 2])
    given, counts = passes({"captions": batch}), counts_of("captions", 1)
    with torch.no_grad():
        blank = objective(given, counts, blank=True)[0].item()
        batch.pixel_values.zero_()
        assert objective(given, counts)[0].item() == pytest.approx(blank, rel=1e-5)


def test_without_gradients_the_loss_is_the_same(objective, make_batch):
    """As when the blank loss is measured."""
    batch = make_batch([6, 7], [1, 2])
    given, counts = passes({"captions": batch}), counts_of("captions", 1)
    with torch.no_grad():
        quiet, _ = objective(given, counts)
    assert not quiet.requires_grad
    assert objective(given, counts)[0].item() == pytest.approx(quiet.item())


@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
def test_the_head_makes_no_logits_of_all_targets(model, make_batch, z_loss):
    objective = Objective(model, WEIGHTS, FeatureCache(model, 0.0), torch.float32, z_loss)
    batch, made = make_batch([6, 7], [1, 2]), []
    head = model.get_output_embeddings()
    watching = head.register_forward_hook(lambda module, args, output: made.append(output.shape[1]))
    objective(passes({"captions": batch}), counts_of("captions", batch.n_targets))
    watching.remove()
    assert made == [0]


def test_the_z_loss_of_skipped_logits_is_that_of_logits(model, make_batch, monkeypatch):
    objective = Objective(model, WEIGHTS, FeatureCache(model, 0.0), torch.float32, z_loss=0.1)
    batch = make_batch([6, 7], [1, 2])
    given, counts = passes({"captions": batch}), counts_of("captions", batch.n_targets)
    found = []
    for skips in (True, False):
        monkeypatch.setattr(type(model), "skips_logits", skips)
        objective.zero_grad()
        loss, _ = objective(given, counts)
        loss.backward()
        found.append((loss.item(), gradients(objective)))
    (skipped, grads), (whole, wanted) = found
    objective.z_loss = 0.0
    assert skipped == pytest.approx(whole, rel=1e-6)
    assert whole - objective(given, counts)[0].item() > 0.1
    for name, grad in wanted.items():
        torch.testing.assert_close(grads[name], grad, atol=1e-6, rtol=1e-4)


def test_under_autocast_weights_and_gradients_stay_float32(model, make_batch):
    objective = Objective(model, WEIGHTS, FeatureCache(model, 0.0), torch.bfloat16)
    batch = make_batch([6], [1])
    loss, _ = objective(passes({"captions": batch}), counts_of("captions", batch.n_targets))
    loss.backward()
    assert loss.dtype == torch.float32
    assert {value.dtype for value in gradients(objective).values()} == {torch.float32}


@pytest.mark.parametrize("pack", [0, 32])
def test_an_encoder_that_learns_takes_steps_without_pictures(model, make_batch, pack):
    model.unfreeze("vision_encoder")
    objective = Objective(model, WEIGHTS, FeatureCache(model, 0.0), torch.float32)
    for images in ([0, 0], [0, 0], [1, 0]):
        batch = make_batch([6, 4], images)
        loss, _ = objective(passes({"captions": batch}, pack), counts_of("captions", batch.n_targets))
        loss.backward()
        learned = [p.grad.abs().sum() for p in model.vision_encoder.parameters()]  # type: ignore[union-attr]
        assert (sum(learned) > 0) == any(images)
        objective.zero_grad()

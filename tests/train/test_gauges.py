"""What is measured at a step, against figures worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from flamingo import expansion
from flamingo.data.packing import packed, padded
from flamingo.train import gauges
from tests.train.tiny import tiny_model


def test_gates_are_reported_as_they_act(model):
    model.gated_blocks[0].attn_gate.data.fill_(0.0)
    model.gated_blocks[1].attn_gate.data.fill_(-0.3)
    values = gauges.gates(model.gated_blocks)
    tanh = torch.tensor([-0.3, 0.7]).tanh().tolist()
    assert values["gate_attention"] == pytest.approx([0.0, tanh[0]], abs=1e-4)
    assert values["gate_feed_forward"] == pytest.approx([tanh[1]] * 2, abs=1e-4)


def test_a_gate_per_channel_is_reported_by_its_mean_opening(model):
    model.gated_blocks[0].attn_gate = nn.Parameter(torch.tensor([0.5, -0.5, 0.0, 0.0]))
    values = gauges.gates(model.gated_blocks)
    assert values["gate_attention"][0] == pytest.approx(math.tanh(0.5) / 2, abs=1e-4)


def test_gates_that_lie_on_another_rank_are_left_out():
    block = nn.Module()
    block.attn_gate = nn.Parameter(torch.empty(0))  # as ZeRO-3 leaves what it shares out
    block.ff_gate = nn.Parameter(torch.zeros(1))
    assert gauges.gates(nn.ModuleList([block])) == {}


def norms(groups: dict) -> dict[str, float]:
    return gauges.norms(groups, gauges.squared_norms(groups, torch.device("cpu")))


def test_gradient_norms_are_those_of_each_group():
    torch.manual_seed(0)
    gates = [torch.randn(1), None, torch.randn(1)]
    blocks = [torch.randn(4, 8), torch.randn(8), torch.empty(0)]
    found = norms({"gates": gates, "gated_blocks": blocks, "lora": []})
    whole = {
        "gates": torch.cat([g for g in gates if g is not None]).norm().item(),
        "gated_blocks": torch.cat([g.flatten() for g in blocks]).norm().item(),
        "lora": 0.0,
    }
    assert found == pytest.approx(whole, rel=5e-6)
    assert norms({}) == {}


def test_gradient_norms_of_shares_add_up_over_ranks():
    torch.manual_seed(0)
    whole = torch.randn(100)
    shares = [whole[:37], whole[37:], torch.empty(0)]  # of three ranks
    device = torch.device("cpu")
    squares = torch.stack([gauges.squared_norms({"resampler": [s]}, device) for s in shares]).sum(0)
    assert gauges.norms(["resampler"], squares)["resampler"] == pytest.approx(whole.norm().item(), rel=5e-6)


def test_gradients_in_half_precision_do_not_overflow():
    large = torch.full((10_000,), 200.0, dtype=torch.float16)  # squares end at 65504 in float16
    found = norms({"resampler": [large]})
    assert found["resampler"] == pytest.approx(20_000.0)


def test_a_gradient_that_is_not_finite_shows_in_its_group_only():
    found = norms({"a": [torch.tensor([math.nan])], "b": [torch.tensor([3.0, 4.0])]})
    assert math.isnan(found["a"]) and found["b"] == 5.0


def test_padding_is_what_no_token_fills(make_batch):
    batches = [make_batch([6, 2], images=[1, 0])]
    assert int(batches[0].attention_mask.sum()) == 8 + 3
    found = [
        gauges.held(passes) for passes in (padded(batches), packed(batches, 16, 21), packed(batches, 8, 21))
    ]
    # Two rows of eight; one without the first document's last token; two again, each with its own.
    assert [part.row_places for part in found] == [16, 10, 16]
    assert [part.tokens for part in found] == [part.read_tokens for part in found] == [11, 10, 11]
    assert [part.pairs for part in found] == [8**2 + 3**2, 7**2 + 3**2, 8**2 + 3**2]
    shares = [gauges.derived({"tokens": 11, **vars(part)})["padding_share"] for part in found]
    assert shares == pytest.approx([1 - 11 / 16, 0.0, 1 - 11 / 16], abs=1e-4)
    assert sum(found, gauges.Held()) == gauges.Held(32, 32, 73 + 58 + 73, 42)


@pytest.mark.parametrize("filled_up", [False, True])
def test_padding_of_rows_that_grow_with_their_images_is_counted_as_the_lm_reads_them(
    make_batch, monkeypatch, filled_up
):
    # Where products are prepared, to a size that comes again.
    monkeypatch.setattr(expansion, "recurring", lambda size: -(-size // 16) * 16 if filled_up else size)
    batches = [make_batch([6, 2], images=[1, 0])]
    model = tiny_model(connector="mlp", fusion="prefix")
    token, each = model.config.image_token_id, model.image_tokens  # 4 places: 4 tokens
    for passes in (padded(batches), packed(batches, 16, token, each)):
        widths = []
        model.language_model.register_forward_pre_hook(
            lambda _, args, kwargs, seen=widths: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        for rows in passes:
            pixels = rows.pixel_values
            model(
                rows.input_ids, rows.attention_mask, pixels, segment_ids=rows.segment_ids, labels=rows.labels
            )
        held = gauges.held(passes, token, each)
        assert held.row_places == widths[0]  # what the LM got
        assert held.read_tokens == held.tokens + (each - 1)
        record = {"tokens": 11, **vars(held)}
        share = gauges.derived(record)["padding_share"]
        assert share == pytest.approx(1 - held.read_tokens / held.row_places, abs=1e-4)
    assert held.read_tokens == 10 + (each - 1)
    assert held.row_places == (16 if filled_up else held.read_tokens) and (share == 0.0) != filled_up


def test_rates_and_shares_of_a_step():
    record = {
        "seconds": 2.0,
        "data_seconds": 0.5,
        "samples": 64,
        "tokens": 800,
        "images": 96,
        "row_places": 1000,
    }
    assert gauges.derived(record, flops=6e12, peak=10e12) == {
        "samples_per_second": 32.0,
        "tokens_per_second": 400.0,
        "images_per_second": 48.0,
        "data_share": 0.25,
        "flops_per_second": 3e12,
        "peak_share": 0.3,
        "padding_share": 0.2,
    }


@pytest.mark.parametrize("missing", ["peak", "flops", "row_places", "data_seconds", "seconds"])
def test_what_was_not_measured_is_left_out(missing):
    record = {"seconds": 2.0, "data_seconds": 0.5, "samples": 4, "tokens": 8, "images": 1, "row_places": 10}
    given = {"flops": 6e12, "peak": 1e13}
    (record if missing in record else given).pop(missing)
    gone = {
        "peak": {"peak_share"},
        "flops": {"peak_share", "flops_per_second"},
        "row_places": {"padding_share"},
        "data_seconds": {"data_share"},
    }
    gone["seconds"] = {*gone["flops"], *gone["data_seconds"]}
    gone["seconds"] |= {f"{name}_per_second" for name in gauges.COUNTS}
    whole = gauges.derived(
        {"seconds": 2.0, "data_seconds": 0.5, "samples": 4, "tokens": 8, "images": 1, "row_places": 10},
        flops=6e12,
        peak=1e13,
    )
    assert set(whole) - set(gauges.derived(record, **given)) == gone[missing]


def test_the_page_on_reading_a_run_explains_every_figure(model):
    page = (Path(__file__).parents[2] / "docs" / "reading-a-run.md").read_text()
    record = {"seconds": 2.0, "data_seconds": 0.5, "samples": 4, "tokens": 8, "images": 1, "row_places": 10}
    figures = {**gauges.derived(record, flops=1.0, peak=1.0), **gauges.gates(model.gated_blocks)}
    assert len(figures) == 9
    assert [name for name in (*figures, "memory_gb", "grad_norms") if f"`{name}`" not in page] == []


def test_memory_of_a_process_is_its_peak_in_gigabytes():
    before = gauges.memory_gb(torch.device("cpu"))
    held = torch.ones(60_000_000)  # 0.24 GB
    during = gauges.memory_gb(torch.device("cpu"))
    assert 0.05 < before <= during < 100
    assert during >= held.numel() * 4 / 1e9
    del held
    assert gauges.memory_gb(torch.device("cpu")) >= during  # a peak does not fall


def test_memory_of_a_gpu_is_what_was_allocated_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 12_345_678_900)
    assert gauges.memory_gb(torch.device("cuda", 0)) == 12.346

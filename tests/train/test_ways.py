"""Precisions, offloading, recomputing, adapters, bad steps and loading in pieces, on real ranks."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.train import ways
from tests.train.ranks import in_ranks

SGD = {"optimizer": {"lr": 1e-3, "warmup_steps": 0}}


def test_every_way_to_train_takes_about_the_same_steps(tmp_path):
    """bfloat16, offloading, recomputing: against plain float32."""
    settings = [
        {},
        {"autocast": "bfloat16", "zero_stage": 3},
        {"zero_stage": 1, "offload": "optimizer"},
        {"zero_stage": 3, "offload": "all"},
        {"activation_checkpointing": True},
        {"activation_checkpointing": True, "zero_stage": 3},
    ]
    plain, *others = in_ranks(2, tmp_path, ways.losses_of_all, [{**SGD, **s} for s in settings], 3)[0]
    assert plain[-1] < plain[0]
    for setting, losses in zip(settings[1:], others, strict=True):
        half = setting.get("autocast", "float32") != "float32"
        assert losses == pytest.approx(plain, rel=2e-2 if half else 1e-5), setting


def test_gradients_are_clipped_once_and_groups_have_their_learning_rates(tmp_path):
    """Adam's first step moves a weight by its learning rate, whatever the size of its gradient."""
    optimizer = {
        "lr": 1e-3,
        "warmup_steps": 0,
        "weight_decay": 0,
        "clip": 0.01,
        "lr_factors": {"resampler": 0.25, "embeddings": 3},
    }
    settings = [
        {"optimizer": optimizer, "zero_stage": stage, "accumulation": accumulation}
        for stage, accumulation in ((0, 1), (0, 2), (1, 1), (2, 3), (3, 1))
    ]
    for found in in_ranks(2, tmp_path, ways.clipped_of_all, settings)[0]:
        assert found["norm"] > 0.1
        assert found["given"] == pytest.approx(0.01, rel=1e-3)
        assert found["moved"] == pytest.approx(
            {"blocks": 1e-3, "resampler": 0.25e-3, "added_tokens": 3e-3}, rel=1e-2
        )


def test_float16_finds_its_loss_scale_and_learns(tmp_path):
    settings = [{**SGD, "autocast": "float16", "zero_stage": stage} for stage in (0, 2)]
    one, two = in_ranks(2, tmp_path, ways.losses_of_all, settings, 10)[0]
    assert one[0] > 4 and min(one) < 3.75
    assert two == pytest.approx(one, rel=1e-2)


@pytest.mark.slow
def test_compiled_parts_take_the_same_steps(tmp_path):
    plain, compiled = in_ranks(1, tmp_path, ways.losses_of_all, [SGD, {**SGD, "compile": True}], 3)[0]
    assert compiled == pytest.approx(plain, rel=1e-4)


def test_what_is_not_finite_on_one_rank_makes_all_skip_the_step(tmp_path):
    cases = [(stage, what) for stage in (0, 1, 2, 3) for what in ("loss", "gradient")]
    one, two = in_ranks(2, tmp_path / "out", ways.all_spoilt, str(tmp_path), cases)
    for (stage, what), first, second in zip(cases, one, two, strict=True):
        for told in (first, second):
            assert told["skipped"] and told["same"] and told["moved"], (stage, what)
            assert "max_skipped_steps=1" in told["message"]
        assert first["after"] == second["after"]
        folder = tmp_path / f"{stage}-{what}" / "nonfinite"
        kept = sorted(path.name for path in folder.glob("*.json"))
        ranks = ["00001"] if what == "loss" else ["00000", "00001"]
        assert kept == [f"step-{step:06d}-rank-{rank}.json" for step in (2, 3) for rank in ranks]
        keys = json.loads((folder / kept[-1]).read_text())["keys"]
        assert any("document" in key for part in keys.values() for key in part)


def test_adapters_are_trained_and_the_language_model_stays_what_it_is(tmp_path):
    for found in in_ranks(2, tmp_path, ways.all_adapted, [0, 2, 3]):
        for told in found:
            assert told["frozen"] and told["moved"] and told["adapters"] == 14


def test_under_zero_3_the_language_model_never_exists_whole_on_a_rank(tmp_path, monkeypatch):
    # glibc keeps what was freed, unless it is told not to: what is measured is what is in use.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8, vocab_size=8000
    )
    model = LlamaForCausalLM(config)
    whole = sum(p.numel() * 4 for p in model.parameters())
    model.save_pretrained(tmp_path / "lm")
    for told in in_ranks(2, tmp_path / "out", ways.loaded_in_pieces, str(tmp_path / "lm"), fresh=True):
        assert told["right"]
        assert told["pieces"] == pytest.approx(whole / 2, rel=0.01)
        assert told["most"] < 0.75 * whole


def test_a_write_that_fails_leaves_the_checkpoint_before_and_tells_all_ranks(tmp_path):
    one, two = in_ranks(2, tmp_path / "out", ways.writes_that_fail, str(tmp_path))
    assert len(one) == len(ways.FAILURES)
    for (what, message, newest, left), (_, other, _, _) in zip(one, two, strict=True):
        assert "step-000002 cannot be written" in message and "rank 0" in message, what
        assert message == other and newest == "step-000001", what
        assert left == ["step-000001"] or what == "folder's fsync", what  # then it had its name already


def test_a_background_checkpoint_is_there_as_soon_as_it_is_written_and_damaged_ones_are_not_kept(tmp_path):
    told = in_ranks(2, tmp_path / "out", ways.written_beside_training, str(tmp_path / "run"))
    assert told == [([], ["step-000001"], ["step-000150"])] * 2

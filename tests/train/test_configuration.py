"""DeepSpeed's configuration follows from the recipe; what contradicts it is an error."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from flamingo.train.engine import check_section, configuration
from tests.train.steps import recipe


def test_raw_settings_are_added_where_the_recipe_says_nothing():
    raw = {"zero_optimization": {"reduce_bucket_size": 1000}, "wall_clock_breakdown": True}
    made = configuration(recipe(zero_stage=2, deepspeed=raw), world=3)
    assert made["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    assert made["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    ("raw", "setting"),
    [
        ({"train_batch_size": 8}, "batches of `sources`"),
        ({"gradient_clipping": 2}, "optimizer.clip"),
        ({"optimizer": {"type": "Adamz"}}, "optimizer \\(AdamW\\)"),
        ({"bf16": {"enabled": True}}, "autocast"),
        ({"zero_optimization": {"stage": 3}}, "zero_stage"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "offload"),
        ({"bfloat16": {"enabled": True}}, "autocast"),
        ({"zero_optimization": {"cpu_offload": True}}, "offload"),
        ({"zero_force_ds_cpu_optimizer": True}, "optimizer \\(AdamW of torch\\)"),
    ],
)
def test_what_the_recipe_says_in_its_own_words_is_refused_there(raw, setting):
    with pytest.raises(ValueError, match=f"contradicts the recipe.*{setting}"):
        configuration(recipe(deepspeed=raw), world=1)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"zero_optimisation": {"stage": 2}}, "zero_optimisation: .* did you mean 'zero_optimization'"),
        ({"wall_clock_breakdwn": True}, "wall_clock_breakdwn: .* did you mean 'wall_clock_breakdown'"),
        ({"aio": {"block_sz": 1}}, "aio.block_sz: .* did you mean 'block_size'"),
        (
            {"flops_profiler": {"profil_step": 3}},
            "flops_profiler.profil_step: .* did you mean 'profile_step'",
        ),
        ({"zero_optimization": 3}, "deepspeed.zero_optimization=3: is a section"),
        ({"zero_optimization": {"reduce_bucket": 1}}, "reduce_bucket"),
        ({"flops_profiler": 3}, "DeepSpeed cannot use"),
        (
            {"zero_optimization": {"reduce_bucket_size": "abc"}},
            r"cannot use .*: reduce_bucket_size: Input should be a valid integer[^\n]*\(got 'abc'\)$",
        ),
    ],
)
def test_a_key_that_deepspeed_does_not_know_is_refused(raw, message):
    with pytest.raises(ValueError, match=message):
        check_section(recipe(deepspeed=raw), world=1)


def test_keys_that_deepspeed_knows_pass():
    known = {"wall_clock_breakdown": True, "comms_logger": {"enabled": True}, "aio": {"block_size": 4096}}
    known |= {"flops_profiler": {"enabled": False}, "data_types": {"grad_accum_dtype": "fp32"}}
    zero = {"reduce_bucket_size": 1000, "stage3_max_live_parameters": 0}
    check_section(recipe(zero_stage=3, deepspeed={**known, "zero_optimization": zero}), world=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"offload": "optimizer"}, "needs zero_stage 1, 2 or 3, not 0"),
        ({"offload": "all", "zero_stage": 2}, "needs zero_stage=3, not 2"),
        ({"zero_stage": 3, "unfreeze": [{"part": "embeddings", "start": 5}]}, "set start to 0"),
        ({"zero_stage": 3, "unfreeze": [{"part": "vision_encoder"}]}, "set zero_stage to 2"),
        ({"feature_cache_gb": 1, "unfreeze": [{"part": "vision_encoder"}]}, "feature_cache_gb to 0"),
        ({"unfreeze": [{"part": "resampler"}]}, "part"),
        ({"optimizer": {"lr_factors": {"gate": 2}}}, "lr_factors"),
        ({"zero_stage": 4}, "zero_stage"),
        ({"z_loss": -1}, "z_loss"),
        (
            {"optimizer": {"lr_factors": {"lora": 2}}},
            "lr_factors.lora: nothing of that group is trained: set `lora`",
        ),
        ({"optimizer": {"lr_factors": {"vision_encoder": 2}}}, "unfreeze=.*part: vision_encoder"),
        (
            {
                "model": {"vision": "x", "language": "x", "frozen_dtype": "bfloat16"},
                "unfreeze": [{"part": "embeddings"}],
            },
            "frozen_dtype=bfloat16 cannot read without autocast",
        ),
        ({"optimizer": {"final_lr": 0.1}}, "final_lr=0.1: schedule=constant"),
        ({"optimizer": {"decay_share": 0.2, "schedule": "cosine"}}, "decay_share=0.2: is of schedule=wsd"),
        ({"unfreeze": [{"part": "embeddings"}, {"part": "embeddings", "start": 2}]}, "stands there twice"),
        ({"unfreeze": [{"part": "language_model"}, {"part": "embeddings", "start": 2}]}, "with the language"),
        (
            {
                "model": {"vision": "x", "language": "x", "architecture": {"fusion": "prefix"}},
                "optimizer": {"lr_factors": {"gates": 2}},
            },
            "lr_factors.gates: fusion=prefix has none",
        ),
        ({"unfreeze": [{"part": "embeddings", "start": 10}]}, "from step 10 on, but the run has steps=10"),
        ({"profile_steps": [3, 11]}, "profile_steps: 11 is none of the steps 1 to 10"),
    ],
)
def test_settings_that_exclude_each_other_are_named(fields, message):
    with pytest.raises(ValidationError, match=message):
        recipe(**fields)

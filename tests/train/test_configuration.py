"""DeepSpeed's configuration follows from the recipe; what contradicts it is an error."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from flamingo.train.engine import configuration
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
    ],
)
def test_what_the_recipe_says_in_its_own_words_is_refused_there(raw, setting):
    with pytest.raises(ValueError, match=f"contradicts the recipe.*{setting}"):
        configuration(recipe(deepspeed=raw), world=1)


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
    ],
)
def test_settings_that_exclude_each_other_are_named(fields, message):
    with pytest.raises(ValidationError, match=message):
        recipe(**fields)

"""A run goes on only with the shards that it began with, unless told otherwise."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flamingo.train.manifest import check, check_backbones, digest

BEFORE = {"captions": {"a.tar": "1", "b.tar": "2"}}
CHANGES = {
    "added": ({"a.tar": "1", "b.tar": "2", "c.tar": "3"}, "shard c.tar of source 'captions' was added"),
    "removed": ({"a.tar": "1"}, "shard b.tar of source 'captions' was removed"),
    "altered": ({"a.tar": "1", "b.tar": "9"}, "shard b.tar of source 'captions' was altered"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_names_the_shard_and_the_way_to_accept_it(tmp_path, change):
    after, message = CHANGES[change]
    check(tmp_path, BEFORE, accept=False)
    check(tmp_path, BEFORE, accept=False)
    with pytest.raises(ValueError, match=f"{message}.*--accept-changed-shards"):
        check(tmp_path, {"captions": after}, accept=False)
    check(tmp_path, {"captions": after}, accept=True)
    check(tmp_path, {"captions": after}, accept=False)  # from now on


@pytest.mark.parametrize(
    ("before", "now", "altered"), [("1 x", "1 y", True), ("1 x", "1", False), ("1", "1 y", False)]
)
def test_content_is_compared_where_both_times_it_was_read(tmp_path, before, now, altered):
    check(tmp_path, {"s": {"a.tar": before}}, accept=False)
    if altered:
        with pytest.raises(ValueError, match="a.tar of source 's' was altered"):
            check(tmp_path, {"s": {"a.tar": now}}, accept=False)
    else:
        check(tmp_path, {"s": {"a.tar": now}}, accept=False)


def test_many_changes_are_counted(tmp_path):
    check(tmp_path, {"s": {}}, accept=False)
    with pytest.raises(ValueError, match="and 15 more"):
        check(tmp_path, {"s": {str(n): "x" for n in range(20)}}, accept=False)


def test_a_run_goes_on_only_with_the_weights_that_it_began_with(tmp_path):
    """Of the same shapes and names, under the same path."""
    torch.manual_seed(0)
    one, other = (nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 2, bias=False)) for _ in range(2))
    now = {"model.vision": digest(one.named_parameters()), "model.language": digest(one.named_parameters())}
    check_backbones(tmp_path, now)
    check_backbones(tmp_path, {name: digest(one.named_parameters()) for name in now})
    with pytest.raises(
        ValueError, match=r"model\.language: the weights are not those .* began with.*run=FOLDER"
    ):
        check_backbones(tmp_path, {**now, "model.language": digest(other.named_parameters())})


def test_a_digest_is_of_all_tensors_and_of_no_adapter():
    module = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 2, bias=False))
    before = digest(module.named_parameters())
    module.lora_a = nn.Linear(2, 2)
    assert digest(module.named_parameters()) == before
    with torch.no_grad():
        module[1].weight += 1
    assert digest(module.named_parameters()) != before

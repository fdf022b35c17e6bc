"""A run goes on only with the shards that it began with, unless told otherwise."""

from __future__ import annotations

import pytest

from flamingo.train.manifest import check

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

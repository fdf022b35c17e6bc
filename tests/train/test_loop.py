"""What the loop tells of its steps."""

from __future__ import annotations

from tests.train import ways
from tests.train.ranks import in_ranks


def test_the_wait_for_data_is_that_of_the_slowest_rank(tmp_path):
    for told in in_ranks(2, tmp_path, ways.waits, 0.3):
        assert [record["step"] for record in told] == [1, 2]
        for record in told:
            assert 0.3 <= record["data_seconds"] <= record["seconds"]

"""`flamingo data index`: the index of every shard, stored beside it, before training asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flamingo.data.index import load_index
from flamingo.data.places import expand
from flamingo.data.tools.executors import Executor, Outcome, Task


def index(patterns: Sequence[str], executor: Executor | None = None) -> Outcome:
    """Results: path of a shard -> number of its samples. Shards that cannot be trusted are failures.

    Raises:
        ValueError: no such shards.
    """
    tasks = [Task(str(path), _count, str(path)) for path in expand(patterns)]
    return (executor or Executor()).run(tasks, "indexing")


def _count(path: str) -> int:
    return load_index(Path(path), content=True).count

"""Seconds for the nearest 32 of 200 queries among 100,000 vectors of 768, on one core.

    python -m benchmarks.retrieval [--rows N] [--width D] [--queries Q] [--nearest K] [--rounds N]

Random vectors of length 1. What is timed is `nearest` over FAISS, with the order made exact; and in
the same run, alternating, a plain search by numpy's matrix product in float32. `right` counts the
queries whose neighbours are those of a float64 product. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--nearest", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5, help="pairs of measurements; the median counts")
    return parser.parse_args()


def on_one_core() -> None:
    """Before any library counts cores for its threads."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def seconds(search: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    found = search()
    return time.perf_counter() - began, found


def count_right(vectors, queries, found: list[list[int]]) -> int:
    """Queries whose neighbours are those of a product in float64, whatever their order."""
    import numpy as np

    wide, right = vectors.astype(np.float64), 0
    for query, own in zip(queries, found, strict=True):
        best = np.argpartition(-(wide @ query.astype(np.float64)), len(own))[: len(own)]
        right += set(best.tolist()) == set(own)
    return right


def main() -> None:
    options = arguments()
    on_one_core()
    import numpy as np
    import torch

    from flamingo.eval.retrieval.search import Faiss, nearest

    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    vectors, queries = (
        random.standard_normal((count, options.width), dtype=np.float32)
        for count in (options.rows, options.queries)
    )
    for each in (vectors, queries):
        each /= np.linalg.norm(each, axis=1, keepdims=True)
    members = [[row] for row in range(options.rows)]
    build, backend = seconds(lambda: Faiss(vectors))

    def plain() -> list[list[int]]:
        scores = queries @ vectors.T
        best = np.argpartition(-scores, options.nearest, 1)[:, : options.nearest]
        order = np.argsort(-np.take_along_axis(scores, best, 1), 1)
        return np.take_along_axis(best, order, 1).tolist()

    sides = {"faiss": lambda: nearest(backend, queries, members, options.nearest), "numpy": plain}
    times: dict[str, list[float]] = {name: [] for name in sides}
    found: dict[str, list] = {}
    for _ in range(options.rounds):
        for name, search in sides.items():
            taken, found[name] = seconds(search)
            times[name].append(taken)
    right = count_right(vectors, queries, found["faiss"])
    print(
        json.dumps(
            {
                "rows": options.rows,
                "width": options.width,
                "queries": options.queries,
                "nearest": options.nearest,
                "seconds": round(statistics.median(times["faiss"]), 3),
                "seconds_range": [round(min(times["faiss"]), 3), round(max(times["faiss"]), 3)],
                "numpy_seconds": round(statistics.median(times["numpy"]), 3),
                "build_seconds": round(build, 3),
                "right": right,
            }
        )
    )


if __name__ == "__main__":
    main()

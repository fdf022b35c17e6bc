"""Exact search: what a backend finds, put in an order that does not depend on it.

Q queries, R rows, K rows found, D width of a vector.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, Protocol

import numpy as np

SPARE = 16  # rows beyond what is needed that are fetched at once
PLACES = 6  # decimals of a cosine: nearer than that is as near, and the first in the pool goes first
MARGIN = 2e-5  # what a backend's float32 scores may be off
QUERIES = 1024  # searched at a time; FAISS is several times slower with few at a time


class Backend(Protocol):
    """Rows of vectors. most: that one search may give."""

    rows: int
    most: int

    def top(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(scores float32[Q, K], rows int64[Q, K]) by inner product, the highest first."""
        ...

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """float32[K, D] of rows int64[K]."""
        ...

    def about(self, rows: np.ndarray) -> list[str]:
        """What is said of rows int64[K]."""
        ...


class Faiss:
    """All in memory, compared one by one."""

    def __init__(self, vectors: np.ndarray, about: Sequence[str] = ()):
        """vectors: float32[R, D]; about: a line on each row, where there is one."""
        faiss = _faiss()
        self.rows = self.most = len(vectors)
        self._vectors, self._about = vectors, about
        self._index: Any = faiss.IndexFlatIP(vectors.shape[1])
        self._index.add(vectors)

    def top(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        return self._index.search(queries, count)

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        return self._vectors[rows]

    def about(self, rows: np.ndarray) -> list[str]:
        return [self._about[int(row)] for row in rows]


def _faiss() -> Any:
    """The module, on as many threads as PyTorch, with kernels of this processor in its wheel's OpenBLAS.

    That OpenBLAS is older than many processors, and one that it does not know gets kernels of 2004: four
    times as slow on a Xeon of 2023. PyTorch knows the processor. OpenBLAS looks at the variable only
    while it is loaded, so nothing else is touched; a value that the user gave stands.
    """
    import torch

    name = "OPENBLAS_CORETYPE"
    kernels = {"AVX512": "SkylakeX", "AVX2": "Haswell"}.get(torch.backends.cpu.get_cpu_capability(), "")
    ours = bool(kernels) and name not in os.environ
    if ours:
        os.environ[name] = kernels
    try:
        import faiss
    except ImportError:
        raise ValueError("FAISS is not there: pip install 'flamingo-vlm[eval]'") from None
    finally:
        if ours:
            del os.environ[name]
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def nearest(
    backend: Backend,
    queries: np.ndarray,
    members: Sequence[Sequence[int]] | None,
    need: int,
    barred: Callable[[int, int], bool] = lambda query, position: False,
) -> list[list[int]]:
    """Positions in the pool, nearest first, `need` of them for each of float32[Q, D] queries.

    members: of each row, the positions that have its content, ascending; None: the row itself;
    barred(query, position): what a query must not get. Scores are computed again in float64 and ties
    go by position, so that the order does not depend on the backend; more rows are fetched until no tie
    can lie outside of them.
    """
    found: list[list[int]] = [[] for _ in queries]
    left, fetch = list(range(len(queries))), min(backend.rows, need + SPARE)
    of_row = members.__getitem__ if members is not None else lambda row: (row,)
    while left:
        if fetch > backend.most:
            backend = Faiss(backend.vectors(np.arange(backend.rows)))
        short = []
        for start in range(0, len(left), QUERIES):
            numbers = left[start : start + QUERIES]
            scores, rows = backend.top(queries[numbers], fetch)
            for number, of_backend, own in zip(numbers, scores, rows, strict=True):
                exact = (backend.vectors(own).astype(np.float64) * queries[number]).sum(1).round(PLACES)
                ranked = [
                    (-score, position)
                    for score, row in zip(exact.tolist(), own.tolist(), strict=True)
                    for position in islice((p for p in of_row(row) if not barred(number, p)), need)
                ]
                ranked = sorted(ranked)[:need]
                found[number] = [position for _, position in ranked]
                certain = len(ranked) == need and of_backend[-1] < -ranked[-1][0] - MARGIN
                if fetch < backend.rows and not certain:
                    short.append(number)
        left, fetch = short, min(backend.rows, 4 * fetch)
    return found

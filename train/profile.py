"""Profiler traces of single steps, for chrome://tracing or Perfetto."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from flamingo.train.config import Recipe


@contextmanager
def profiled(recipe: Recipe, step: int, rank: int) -> Iterator[None]:
    """Writes RUN/profile/step-N-rank-R.json.gz if the recipe wants a trace of this step (from 1)."""
    if step not in recipe.profile_steps:
        yield
        return
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True) as found:
        yield
    folder = recipe.run / "profile"
    folder.mkdir(parents=True, exist_ok=True)
    found.export_chrome_trace(str(folder / f"step-{step:06d}-rank-{rank:05d}.json.gz"))

"""Optimizer step -> the micro-batches of this rank, for any number of ranks and micro-batches.

Sample i of step s is position (s - start) * batch + i of its source, which joins at step `start`.
Rank r of R takes a contiguous run of i, in `accumulation` equal parts: read in the order of ranks,
then parts, the samples of a step are the same whatever R and `accumulation` are. The only state of
a run is the number of steps that it has consumed, which belongs to the trainer: workers may have
read ahead.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from flamingo.data.batch import Batch, Collator
from flamingo.data.config import SourceConfig
from flamingo.data.stream import Stream
from flamingo.data.transforms import ImageTransform

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

StepBatches = dict[str, list[Batch]]  # source name -> micro-batches of this rank
V = TypeVar("V")


@dataclass(frozen=True)
class Feed:
    """One source, ready to be read. `batch`: samples per optimizer step over all ranks."""

    stream: Stream
    collator: Collator
    batch: int
    start: int = 0  # the step at which the source joins

    @property
    def name(self) -> str:
        return self.stream.name


def open_feeds(
    sources: Sequence[SourceConfig],
    *,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    transform: ImageTransform,
    image_token_id: int,
    end_of_chunk_id: int,
    has_features: Callable[[str], bool] | None = None,
) -> list[Feed]:
    """Open the shards of every source of a recipe.

    has_features: asked with a content key, whether the picture need not be decoded. The loader's
    workers ask it too, so it must pickle and not depend on what a process learns later.

    Raises:
        ValueError: a source is wrong, or two have the same name.
    """
    names = [source.name for source in sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"`name` of sources must differ: {', '.join(twice)} is there twice")
    return [
        Feed(
            Stream(source, seed, image_side=transform.size, has_features=has_features),
            Collator(
                tokenizer,
                transform,
                image_token_id,
                end_of_chunk_id,
                source.max_tokens,
                source.crop,
                source.learn,
            ),
            source.batch,
            source.start,
        )
        for source in sources
    ]


def part_of_step(step: int, batch: int, part: int, parts: int) -> range:
    """Positions in a source of one micro-batch: part `rank * accumulation + number` of a step.

    step: counted from the one at which the source joined. batch: a multiple of parts.
    """
    size = batch // parts
    start = step * batch + part * size
    return range(start, start + size)


class StepDataset(Dataset[StepBatches]):
    """dataset[step] -> {source name: micro-batches of this rank}, for the sources that have joined.

    Args:
        feeds: the sources.
        rank, ranks: which part of each step this process trains on.
        accumulation: micro-batches per step and rank.
        skip_pixels: see `Collator.__call__`. With workers it runs in their processes and must
            not depend on what this process learns later.

    Raises:
        ValueError: a batch that ranks and micro-batches do not divide.
    """

    def __init__(
        self,
        feeds: Sequence[Feed],
        rank: int = 0,
        ranks: int = 1,
        accumulation: int = 1,
        skip_pixels: Callable[[str], bool] | None = None,
    ) -> None:
        if not feeds:
            raise ValueError("no sources: a recipe needs at least one")
        if not 0 <= rank < ranks or accumulation < 1:
            raise ValueError(
                f"rank {rank} of {ranks} ranks with accumulation {accumulation}: "
                "rank counts from 0, accumulation from 1"
            )
        parts = ranks * accumulation
        for feed in feeds:
            if feed.batch % parts:
                below = feed.batch - feed.batch % parts
                near = f"{below} or {below + parts}" if below else str(parts)
                raise ValueError(
                    f"source {feed.name!r}: batch {feed.batch} cannot be divided by {ranks} ranks "
                    f"x accumulation {accumulation} = {parts}; set `batch` to {near}, or change "
                    "`accumulation`"
                )
        self.feeds, self.skip_pixels = list(feeds), skip_pixels
        self.rank, self.ranks, self.accumulation = rank, ranks, accumulation

    def __getitem__(self, step: int) -> StepBatches:
        parts = range(self.accumulation)
        joined = [feed for feed in self.feeds if step >= feed.start]
        return {feed.name: [self._part(feed, step, part) for part in parts] for feed in joined}

    def _part(self, feed: Feed, step: int, part: int) -> Batch:
        number, parts = self.rank * self.accumulation + part, self.ranks * self.accumulation
        positions = part_of_step(step - feed.start, feed.batch, number, parts)
        read = [feed.stream.read(position) for position in positions]
        batch = feed.collator([document for document, _ in read], self.skip_pixels)
        ahead = torch.tensor([feed.stream.looks_ahead(position) for position in positions])
        return replace(
            batch,
            skipped=[bad for _, skipped in read for bad in skipped],
            look_ahead=ahead if ahead.any() else None,
        )


def step_loader(dataset: Dataset[V], start: int, stop: int, workers: int = 0) -> Iterator[V]:
    """The steps start, start + 1, ... stop - 1, in order, read ahead by `workers` processes."""
    loader = DataLoader(
        dataset,
        batch_size=None,  # the dataset makes the batches
        sampler=range(start, stop),
        num_workers=workers,
        collate_fn=_unchanged,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own: the trainer's random numbers stay as they are
        worker_init_fn=_outlive_signals,
    )
    with _held_back() if workers else nullcontext():
        return iter(loader)


LOOK_SECONDS = 2.0  # after which a worker has seen that its rank is gone
# What a job is told to stop with.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1) if hasattr(signal, "sigwaitinfo") else ()  # macOS: none


@contextmanager
def _held_back() -> Iterator[None]:
    """Within this `with`, signals wait; processes that are started here hold them back from the start.

    Some libraries (grpc) begin threads in every new process before anything of ours runs in it, and
    a signal is delivered to any thread that does not hold it back.
    """
    if multiprocessing.get_start_method() != "fork":
        resource_tracker.ensure_running()  # now: its start lets SIGTERM through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _outlive_signals(worker: int) -> None:
    """In a worker: a SIGTERM or SIGUSR1 to the whole job does not end it, one from its rank or the end of
    its rank does.

    The rank finishes its step and writes a checkpoint, for which it needs its workers. Where processes
    are forked by a server (Python's default from 3.14 on), that is the system's parent, and lives on as
    long as they do: so it is multiprocessing that is asked.
    """
    rank = multiprocessing.parent_process()
    if not SIGNALS or rank is None:
        return

    def listen() -> None:
        while rank.is_alive():
            told = signal.sigtimedwait(SIGNALS, LOOK_SECONDS)
            if told and told.si_pid == rank.pid:
                break
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=listen, daemon=True).start()


def _unchanged(batches: Any) -> Any:
    return batches

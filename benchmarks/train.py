"""Training steps side by side: OpenFlamingo 2.0.1, a plain loop, and this one with each of its savings.

    python -m benchmarks.train [opponent|savings] [--language NAME_OR_FOLDER] [--vision SOURCE:NAME]

Both sides train the same connecting parts (OpenFlamingo's shapes) on the same frozen LM and encoder,
with the same captions and interleaved documents. Each side is a process of its own, which keeps freed
memory where its training command does (`flamingo train`), with as many threads as cores; in every round
each takes one step, in turn, and the median over the rounds counts. One line of JSON per side, then
a table. Times count the step alone: reading and tokenising come before it, on both sides.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import mixture, opponent, ours
from benchmarks.workers import Worker
from flamingo.runtime import arithmetic, keep_freed_memory, quiet_libraries

WEIGHTS = (0.2, 1.0)  # captions, documents: OpenFlamingo's loss multipliers


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", nargs="?", choices=["opponent", "savings"], default="opponent")
    parser.add_argument("--language", default="data/backbones/smollm2-135m-instruct")
    parser.add_argument("--vision", default="timm:data/backbones/efficientnet-lite0")
    parser.add_argument("--captions", type=int, default=8, help="caption pairs per step")
    parser.add_argument("--documents", type=int, default=4, help="interleaved documents per step")
    parser.add_argument("--every", type=int, default=4, help="LM layers per gated block")
    parser.add_argument("--resampler-depth", type=int, default=2, help="layers; OpenFlamingo's models: 6")
    parser.add_argument("--pack-tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3, help="that are counted")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before: fresh memory is slow")
    parser.add_argument("--together", type=int, default=4, help="sides in memory at a time, 2 or more")
    parser.add_argument("--precision", choices=["amp_bf16", "fp32"], help="default: what is faster here")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(given)
    options.precision = options.precision or ("amp_bf16" if arithmetic() == "bfloat16" else "fp32")
    if options.rounds < 1 or options.together < 2:
        parser.error("--rounds must be at least 1, --together at least 2")
    return options


# -- the sides: called in their own processes ----------------------------------------------


def architecture(options: argparse.Namespace) -> dict[str, Any]:
    """OpenFlamingo's shapes: 64 latents as wide as the encoder, blocks of 8 heads and 4 widths."""
    return {
        "resampler_depth": options.resampler_depth,
        "cross_attention_every": options.every,
        "cross_attention_offset": options.every - 1,
        "cross_attention_scale": None,
    }


def our_side(options: argparse.Namespace, savings: ours.Savings) -> ours.Ours:
    if savings.kept_memory:
        keep_freed_memory()
    autocast = torch.bfloat16 if options.precision == "amp_bf16" else torch.float32
    savings = replace(savings, frozen_bfloat16=savings.frozen_bfloat16 and autocast != torch.float32)
    model, processor = ours.load(options.vision, options.language, savings, architecture(options))
    if torch.cuda.is_available():
        model.to("cuda")  # type: ignore[arg-type]
    return ours.Ours(model, processor, savings, autocast, WEIGHTS, options.pack_tokens)


def their_side(options: argparse.Namespace, tuned: bool) -> opponent.Opponent:
    from flamingo import vision
    from flamingo.data.transforms import ImageTransform

    if tuned:
        keep_freed_memory()
    name, _, path = options.vision.partition(":")
    source = vision.source(name)
    config = source.describe(path)
    encoder = source.build(config)
    source.load(encoder, path)
    tokenizer = opponent.its_tokenizer(options.language)
    model = opponent.load(
        options.language,
        encoder,
        config.width,
        tokenizer,
        options.every,
        options.resampler_depth,
        tuned,
        options.precision,
    )
    if torch.cuda.is_available():
        model.to("cuda")
    transform = ImageTransform(config.image_size, tuple(config.mean), tuple(config.std))
    return opponent.Opponent(model, tokenizer, transform, options.precision, WEIGHTS)


def sides(options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Name -> what loads it."""
    standard = ours.Savings.first(ours.STANDARD)
    if options.part == "opponent":
        return {
            "openflamingo": partial(their_side, options, False),
            "openflamingo, our memory and frozen parts": partial(their_side, options, True),
            "ours": partial(our_side, options, standard),
            "ours, compiled": partial(our_side, options, replace(standard, compiled=True)),
        }
    ladder = {
        f"+ {name}": partial(our_side, options, ours.Savings.first(number))
        for number, name in enumerate(ours.NAMES, 1)
    }
    return {"plain loop": partial(our_side, options, ours.Savings()), **ladder}


# -- the measurement -----------------------------------------------------------------------


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row per side. So many `together` as memory allows, always beside the first of all."""
    side = image_size(options.vision)
    source = mixture.steps(options.seed, options.captions, options.documents, side)
    steps = list(islice(source, options.warmup + options.rounds))
    first, *others = sides(options).items()
    size = options.together - 1
    digests: set[Any] = set()
    for begin in range(0, len(others), size):
        group = dict([first, *others[begin : begin + size]])
        with ExitStack() as stack:
            workers = {name: stack.enter_context(Worker(load, steps)) for name, load in group.items()}
            rounds = [{name: worker.step(n) for name, worker in workers.items()} for n in range(len(steps))]
            loaded = {name: worker.loaded for name, worker in workers.items()}
        check_same_targets(rounds)
        digests.add(tuple(r[first[0]]["digest"] for r in rounds))
        for name in [*group][bool(begin) :]:
            yield row(name, first[0], rounds, options.warmup, loaded[name], len(steps[0]))
    assert len(digests) == 1, "the groups learned different tokens"


def image_size(vision_name: str) -> int:
    from flamingo import vision

    name, _, path = vision_name.partition(":")
    return vision.source(name).describe(path).image_size


def check_same_targets(rounds: list[dict[str, dict[str, Any]]]) -> None:
    """Raises ValueError unless all sides learned the same tokens in every step."""
    for number, results in enumerate(rounds):
        digests = {name: (result["targets"], result["digest"]) for name, result in results.items()}
        if len(set(digests.values())) > 1:
            raise ValueError(f"step {number}: the sides learned different tokens: {digests}")


def row(
    name: str,
    first: str,
    rounds: list[dict[str, dict[str, Any]]],
    warmup: int,
    loaded: float,
    samples: int,
) -> dict[str, Any]:
    """What is printed of a side; `first` is the one that it is compared with, round by round."""
    timed = rounds[warmup:]
    mine, theirs = [r[name] for r in timed], [r[first] for r in timed]
    faster = sorted(b["seconds"] / a["seconds"] for a, b in zip(mine, theirs, strict=True))
    seconds = statistics.median(r["seconds"] for r in mine)
    most = max(r[name]["peak"] for r in rounds)
    return {
        "side": name,
        "seconds": round(seconds, 4),
        "samples_per_second": round(samples / seconds, 3),
        "times_as_fast": round(statistics.median(faster), 3),
        "times_as_fast_range": [round(faster[0], 3), round(faster[-1], 3)],
        "peak_mib": round(most),
        "peak_ratio": round(most / max(r[first]["peak"] for r in rounds), 3),
        "loaded_mib": round(loaded),
        "tokens": round(statistics.mean(r["tokens"] for r in mine)),
        "images": round(statistics.mean(r["images"] for r in mine), 1),
        "targets": round(statistics.mean(r["targets"] for r in mine)),
        "first_losses": [round(loss, 4) for loss in rounds[0][name]["losses"]],
    }


def show(rows: list[dict[str, Any]]) -> None:
    """The rows as a table for people."""
    table = Table(title="one optimizer step; memory above the state after loading")
    columns = {
        "side": "side",
        "s": "seconds",
        "samples/s": "samples_per_second",
        "times as fast": "times_as_fast",
        "peak MiB": "peak_mib",
        "peak ratio": "peak_ratio",
        "tokens": "tokens",
        "images": "images",
        "targets": "targets",
    }
    for title in columns:
        table.add_column(title, justify="left" if title == "side" else "right", overflow="fold")
    for line in rows:
        table.add_row(*(str(line[key]) for key in columns.values()))
    Console(width=120).print(table)


def main(given: list[str] | None = None) -> None:
    options = arguments(given)
    quiet_libraries()
    if options.part == "opponent" and (missing := opponent.missing()):
        raise SystemExit(f"{', '.join(missing)} not installed: make bench installs what it needs")
    rows = []
    for line in measure(options):
        rows.append(line)
        print(json.dumps(line), flush=True)
    show(rows)


if __name__ == "__main__":
    main()

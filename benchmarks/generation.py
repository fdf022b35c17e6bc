"""Time per new token after 32 shots against 0 shots, in one run, alternating.

    python -m benchmarks.generation [--language NAME_OR_FOLDER] [--vision SOURCE:NAME]

Untrained connecting parts of the usual size (64 latents) on a real frozen LM: the arithmetic is
that of a trained model. Prints one line of JSON; `ratio` is the figure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from itertools import pairwise

import torch
from transformers.generation.streamers import BaseStreamer

from flamingo.attention import attend_plainly
from flamingo.factory import create
from flamingo.runtime import dtype_of, quiet_libraries, tune_cpu


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--language", default="data/backbones/smollm2-135m-instruct")
    parser.add_argument("--vision", default="timm:data/backbones/efficientnet-lite0")
    parser.add_argument("--shots", type=int, default=32)
    parser.add_argument("--latents", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32, help="new tokens that are timed")
    parser.add_argument("--rounds", type=int, default=7, help="pairs of measurements; the median counts")
    return parser.parse_args()


def prompt(processor, shots: int) -> torch.Tensor:
    """int64[1, T]: `shots` demonstrations and a query."""
    turn = "<image>Question: what color is the shape? Answer: blue<|endofchunk|>"
    text = turn * shots + "<image>Question: what color is the shape? Answer:"
    return processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]


class Clock(BaseStreamer):
    """Notes when each token comes."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@torch.inference_mode()
def seconds_per_token(model, ids: torch.Tensor, media, tokens: int) -> float:
    """Median time between two new tokens: the prompt's own time is not in it."""
    clock = Clock()
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        media=media,
        max_new_tokens=tokens + 1,
        min_new_tokens=tokens + 1,
        do_sample=False,
        streamer=clock,
    )
    times = clock.times[1:]  # the first is the prompt
    return statistics.median(b - a for a, b in pairwise(times))


def main() -> None:
    options = arguments()
    quiet_libraries()
    tune_cpu()
    model, processor = create(
        vision=options.vision,
        language=options.language,
        frozen_dtype=dtype_of("auto"),
        resampler_latents=options.latents,
        gate_init=0.5,
    )
    model = model.eval().to(dtype_of("auto"))  # type: ignore[arg-type]
    attend_plainly(model.language_model)  # as `flamingo eval` and `flamingo generate` do
    size = model.config.vision_config.image_size  # type: ignore[union-attr]
    cases = {}
    with torch.inference_mode():
        for shots in (0, options.shots):
            pixels = torch.randn(shots + 1, 3, size, size)
            cases[shots] = (prompt(processor, shots), model.media(pixel_values=pixels))
    times: dict[int, list[float]] = {shots: [] for shots in cases}
    for _ in range(options.rounds):
        for shots, (ids, media) in cases.items():
            times[shots].append(seconds_per_token(model, ids, media, options.tokens))
    few, many = (statistics.median(times[shots]) for shots in cases)
    ratios = sorted(b / a for a, b in zip(*times.values(), strict=True))
    print(
        json.dumps(
            {
                "shots": options.shots,
                "latents": options.latents,
                "prompt_tokens": [len(ids[0]) for ids, _ in cases.values()],
                "ratio": round(many / few, 4),
                "ratio_range": [round(ratios[0], 4), round(ratios[-1], 4)],
            }
        )
    )


if __name__ == "__main__":
    main()

"""Seconds until the demo page shows the first token of an answer, with a model that is warm.

    python -m benchmarks.demo MODEL [--questions 20] [--examples 0 4]

Asks what the page asks when Ask is clicked (`serving.demo.asking`), without the browser: test questions of
easy-VQA about their pictures, after so many examples with pictures of their own. Each picture is new
to the model. Prints one line of JSON for each number of examples.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from flamingo.data.easy_vqa import load_split
from flamingo.runtime import quiet_libraries


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="model folder, e.g. runs/quickstart/model")
    parser.add_argument("--questions", type=int, default=20, help="that are timed")
    parser.add_argument("--examples", type=int, nargs="+", default=[0, 4], help="before the question")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    quiet_libraries()
    from flamingo.serving.demo.asking import Asking
    from flamingo.serving.demo.limits import Limits
    from flamingo.serving.demo.turns import Turn
    from flamingo.serving.engine import Engine
    from flamingo.serving.prompt import open_picture

    asking = Asking(Engine(options.model), Limits())
    entries = load_split("test")
    for examples in options.examples:
        firsts, wholes = [], []
        for number in range(options.questions + 1):
            taken = entries[number * (examples + 1) * 7 :: 7][: examples + 1]
            pictures = [open_picture(e.image_path) for e in taken]
            asked = [f"Question: {e.question} Answer:" for e in taken]
            turns = [Turn(*each) for each in zip(asked, pictures, [e.answer for e in taken], strict=True)]
            turns[-1] = Turn(turns[-1].text, turns[-1].picture)
            began, first = time.perf_counter(), 0.0
            asking.begin("benchmark")
            for update in asking.ask(turns, {}, "benchmark"):
                if update.error:
                    raise SystemExit(f"error: {update.status}")
                if update.text and not first:
                    first = time.perf_counter() - began
            if number:  # the first warms the model
                firsts.append(first or time.perf_counter() - began)
                wholes.append(time.perf_counter() - began)
        told = {"examples": examples, "questions": len(firsts)}
        told |= {"first_token": round(statistics.median(firsts), 3), "slowest": round(max(firsts), 3)}
        print(json.dumps({**told, "whole_answer_with_its_looks": round(statistics.median(wholes), 3)}))


if __name__ == "__main__":
    main()

"""Queries per second of a few-shot evaluation: OpenFlamingo 2.0.1's procedure beside this one.

    python -m benchmarks.evaluation [--queries N] [--shots 0 32] [--beams 3] [--precision bf16]

Both sides have the same weights (OpenFlamingo's shapes, converted), and get the same prompts about
the same pictures of easy-VQA. In every round each side answers in turn, on the same cores, and the
median over the rounds counts; one line of JSON per case, then a table.

Their side is `open_flamingo.src` itself; its wheel leaves out the one file of its evaluation that
calls the model, so that is reproduced here, from the rest of `open_flamingo.eval`: batches of 8 in
the order of the queries, padded on the left to the longest; every picture of every query
transformed, encoded and resampled, also demonstrations that came before; `generate` with its cache
of the LM's keys and values, and no other. Decoded demonstrations are kept, as its query set keeps
them. No query depends on another there, so it answers a part of the queries (`--their-queries`) and
its rate is that of any number. Ours answers all, and in every round begins with nothing encoded.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import opponent
from flamingo.attention import attend_plainly
from flamingo.data.transforms import decode_image
from flamingo.eval.benchmarks import easy_vqa
from flamingo.eval.few_shot import Prompt, Setting, build, choose_shots, limited
from flamingo.eval.images import Picture
from flamingo.eval.predictor import Predictor
from flamingo.modeling import FlamingoForConditionalGeneration
from flamingo.processing import FlamingoProcessor
from flamingo.runtime import quiet_libraries, short_attention, tune_cpu

MAX_LENGTH = 2000  # tokens, where OpenFlamingo cuts prompts
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--language", default="data/backbones/smollm2-135m-instruct")
    parser.add_argument("--vision", default="timm:data/backbones/efficientnet-lite0")
    parser.add_argument("--queries", type=int, default=64, help="that ours answers in a round")
    parser.add_argument("--random-queries", type=int, default=32, help="the same, with random shots")
    parser.add_argument(
        "--their-queries", type=int, default=4, help="that theirs answers; four times as many of 0 shots"
    )
    parser.add_argument("--pool", type=int, default=40, help="demonstrations that shots are drawn from")
    parser.add_argument("--shots", type=int, nargs="+", default=[0, 32])
    parser.add_argument("--beams", type=int, default=1, help="OpenFlamingo's default is 3")
    parser.add_argument("--max-new-tokens", type=int, default=5, help="OpenFlamingo's, for VQA")
    parser.add_argument("--batch", type=int, default=8, help="theirs; OpenFlamingo's default")
    parser.add_argument("--tokens-per-batch", type=int, default=2048, help="ours")
    parser.add_argument("--every", type=int, default=4, help="LM layers per gated block")
    parser.add_argument("--resampler-depth", type=int, default=6, help="layers, as in OpenFlamingo")
    parser.add_argument("--precision", choices=list(DTYPES), default="fp32", help="of both sides' weights")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(given)
    least = min(options.queries, options.random_queries, options.their_queries, options.rounds)
    if least < 1:
        parser.error("--queries, --random-queries, --their-queries and --rounds must be at least 1")
    if options.pool < max(options.shots) + 1:
        parser.error(f"--pool {options.pool}: must be more than the most shots, {max(options.shots)}")
    return options


# -- the sides ---------------------------------------------------------------------------


class Theirs:
    """OpenFlamingo's evaluation, from prompts to texts."""

    def __init__(self, model: Any, tokenizer: Any, transform: Callable, options: argparse.Namespace):
        self.model, self.tokenizer, self.transform = model.eval(), tokenizer, transform
        self.options = options
        self.device = next(model.parameters()).device
        tokenizer.padding_side = "left"

    def answer(self, prompts: Sequence[Prompt]) -> list[str]:
        texts: list[str] = []
        for start in range(0, len(prompts), self.options.batch):
            texts += self._outputs(prompts[start : start + self.options.batch])
        return texts

    @torch.inference_mode()
    def _outputs(self, batch: Sequence[Prompt]) -> list[str]:
        encodings = self.tokenizer(
            [prompt.prefix + prompt.text for prompt in batch],
            padding="longest",
            truncation=True,
            return_tensors="pt",
            max_length=MAX_LENGTH,
        ).to(self.device)
        beams = self.options.beams
        outputs = self.model.generate(
            self._pixels(batch),
            encodings["input_ids"],
            attention_mask=encodings["attention_mask"],
            min_new_tokens=0,
            max_new_tokens=self.options.max_new_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
            **({"num_beams": beams, "length_penalty": 0.0} if beams > 1 else {}),
        )
        new = outputs[:, encodings["input_ids"].shape[1] :]
        return self.tokenizer.batch_decode(new, skip_special_tokens=True)

    def _pixels(self, batch: Sequence[Prompt]) -> Tensor:
        """float32[B, I, 1, 3, S, S]: rows with fewer pictures than the most have zeros after them."""
        size: int = self.transform.size  # type: ignore[attr-defined]
        most = max(len(prompt.prefix_images) + 1 for prompt in batch)
        pixels = torch.zeros(len(batch), most, 1, 3, size, size)
        for row, prompt in zip(pixels, batch, strict=True):
            shown = [_demonstration(image) for image in prompt.prefix_images]
            shown += [decode_image(image.read_bytes()) for image in prompt.images if image is not None]
            for place, picture in enumerate(shown):
                row[place, 0] = self.transform(picture)
        return pixels.to(self.device)


@cache
def _demonstration(image: Picture) -> Any:
    assert image is not None
    return decode_image(image.read_bytes())


class Ours:
    """This evaluation; every call begins with nothing encoded."""

    def __init__(
        self,
        model: FlamingoForConditionalGeneration,
        processor: FlamingoProcessor,
        options: argparse.Namespace,
    ):
        self.model, self.processor, self.options = model.eval(), processor, options

    def answer(self, prompts: Sequence[Prompt]) -> list[str]:
        predictor = Predictor.of(
            self.model,
            self.processor,
            max_new_tokens=self.options.max_new_tokens,
            beams=self.options.beams,
            tokens_per_batch=self.options.tokens_per_batch,
        )
        with short_attention():
            found = {id(prompt): text for prompt, text in predictor.predict(prompts)}
        return [found[id(prompt)] for prompt in prompts]


def _let_masks_be_absent(lm: Any) -> None:
    """Today's transformers leaves out a mask without zeros, which OpenFlamingo's forward insists on."""
    forward = type(lm).forward

    def with_default(self, input_ids, attention_mask=None, **kwargs):
        return forward(self, input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    type(lm).forward = with_default  # a class made for this instance


def load(options: argparse.Namespace) -> tuple[Theirs, Ours]:
    """Both sides with the same weights: theirs is made, with open gates, and converted."""
    from flamingo import vision
    from flamingo.checkpoints.openflamingo import convert
    from flamingo.data.transforms import ImageTransform

    name, _, path = options.vision.partition(":")
    source = vision.source(name)
    config = source.describe(path)
    encoder = source.build(config)
    source.load(encoder, path)
    tokenizer = opponent.its_tokenizer(options.language)
    torch.manual_seed(options.seed)
    model: Any = opponent.load(
        options.language, encoder, config.width, tokenizer, options.every, options.resampler_depth, False
    )
    _let_masks_be_absent(model.lang_encoder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_gate"):
                parameter.fill_(0.5)
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    with tempfile.TemporaryDirectory() as folder:
        torch.save(trained, Path(folder) / "checkpoint.pt")
        out = Path(folder) / "model"
        convert(Path(folder) / "checkpoint.pt", options.vision, options.language, options.every, out)
        own = FlamingoForConditionalGeneration.from_pretrained(out, dtype=DTYPES[options.precision])
        processor = FlamingoProcessor.from_pretrained(out)
    model.to(DTYPES[options.precision])
    if torch.cuda.is_available():
        model.to("cuda")
        own.to("cuda")  # type: ignore[arg-type]
    attend_plainly(own.language_model)
    transform = ImageTransform(config.image_size, tuple(config.mean), tuple(config.std))
    return Theirs(model, tokenizer, transform, options), Ours(own, processor, options)


# -- the measurement ---------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Prompts that both sides answer; theirs the first `part`."""

    name: str
    prompts: list[Prompt]
    part: int


def cases(options: argparse.Namespace) -> list[Case]:
    # In the order of the file: several questions about each picture, as in the whole.
    queries = easy_vqa.examples(None, easy_vqa.QUERIES)[: options.queries]
    pool = limited(easy_vqa.examples(None, easy_vqa.DEMONSTRATIONS), options.pool, options.seed)
    found = []
    for shots in options.shots:
        for source in ("random", "fixed") if shots else ("random",):
            setting = Setting(shots, source=source, seed=options.seed, text_shots=True)
            few = options.random_queries if shots and source == "random" else len(queries)
            prompts = [
                build(easy_vqa, query, choose_shots(pool, query, setting), setting) for query in queries[:few]
            ]
            name = f"{shots} shots" + (f", {source}" if shots else "")
            part = options.their_queries * (1 if shots else 4)  # short ones: more, to be timed
            found.append(Case(name, prompts, min(part, len(prompts))))
    return found


def timed(answer: Callable[[Sequence[Prompt]], list[str]], prompts: Sequence[Prompt]) -> tuple[float, list]:
    """(queries per second, texts)."""
    began = time.perf_counter()
    texts = answer(prompts)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return len(prompts) / (time.perf_counter() - began), texts


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per case, printed as it is done."""
    theirs, ours = load(options)
    rows = []
    for case in cases(options):
        for side in (theirs, ours):  # fresh memory is slow
            side.answer(case.prompts[:1])
        rates, same = [], 0
        for number in range(options.rounds):
            their_rate, said = timed(theirs.answer, case.prompts[: case.part])
            our_rate, ours_said = timed(ours.answer, case.prompts)
            rates.append((our_rate, their_rate))
            if not number:
                same = sum(a.strip() == b.strip() for a, b in zip(said, ours_said, strict=False))
        rows.append(row(case, rates, same, options))
        print(json.dumps(rows[-1]), flush=True)
    return rows


def row(
    case: Case, rates: list[tuple[float, float]], same: int, options: argparse.Namespace
) -> dict[str, Any]:
    """rates: of ours and of theirs in each round; same: answers that are equal."""
    ratios = sorted(mine / other for mine, other in rates)
    return {
        "case": case.name,
        "ours": round(statistics.median(mine for mine, _ in rates), 3),
        "theirs": round(statistics.median(other for _, other in rates), 3),
        "times_as_fast": round(statistics.median(ratios), 2),
        "times_as_fast_range": [round(ratios[0], 2), round(ratios[-1], 2)],
        "same_answers": f"{same} of {case.part}",
        "queries": [len(case.prompts), case.part],
        "pictures": len({image for p in case.prompts for image in (*p.prefix_images, *p.images)}),
        "beams": options.beams,
        "precision": options.precision,
    }


def show(rows: list[dict[str, Any]]) -> None:
    """The rows as a table for people."""
    table = Table(title="queries per second")
    columns = {
        "case": "case",
        "OpenFlamingo 2.0.1": "theirs",
        "ours": "ours",
        "times as fast": "times_as_fast",
        "in each round": "times_as_fast_range",
        "same answers": "same_answers",
    }
    for title in columns:
        table.add_column(title, justify="left" if title == "case" else "right")
    for line in rows:
        table.add_row(*(str(line[key]) for key in columns.values()))
    Console(width=110).print(table)


def main(given: list[str] | None = None) -> None:
    options = arguments(given)
    quiet_libraries()
    tune_cpu()
    if missing := opponent.missing():
        raise SystemExit(f"{', '.join(missing)} not installed: make bench installs what it needs")
    show(measure(options))


if __name__ == "__main__":
    main()

"""What a step of OpenFlamingo-9B sends and how long it takes, for 8 to 1,024 GPUs: docs/scaling.md.

    python -m flamingo.train.scaling

Memory and FLOPs are those of `flamingo plan`; what is sent follows from what DeepSpeed 0.19 does.
N ranks, P trained parameters (float32), F bytes of frozen weights, E of them the encoder's, A
micro-batches of a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from flamingo.train import flops
from flamingo.train.config import Recipe, read_recipe
from flamingo.train.planning.assembly import assemble, bytes_of, parameters
from flamingo.train.planning.batches import held_by_step
from flamingo.train.planning.memory import states

RECIPE = Path(__file__).parent / "recipes" / "openflamingo-9b.yaml"
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
STAGES = (0, 1, 2, 3)
HOME = 64  # GPUs that the recipe's batch is for: 32 + 64 documents each, one micro-batch
BUCKET = 5e8  # elements that DeepSpeed reduces in one call (reduce_bucket_size)
PREFETCH = 5e7  # elements that ZeRO-3 gathers in one call (stage3_prefetch_bucket_size)
FLOAT = 4


@dataclass(frozen=True)
class Machine:
    """Eight A100 of 80 GB a node (DGX A100, data sheet): 312 TFLOP/s in bfloat16, NVLink with 300 GB/s
    each way, a 200 Gbit/s InfiniBand card for each GPU. The rest is assumed: the share of each that
    a run reaches, and the time of one hop of a ring."""

    peak: float = 312e12
    utilisation: float = 0.4
    node: int = 8
    inside: float = 300e9
    between: float = 25e9
    reached: float = 0.8
    hop: float = 5e-6


@dataclass(frozen=True)
class Work:
    """A model and its step. frozen: bytes, `encoder` of them in the encoder, which ZeRO-3 leaves whole;
    flops: of the step over all ranks at `HOME`, recomputing included."""

    recipe: Recipe
    trained: int
    frozen: int
    encoder: int
    flops: float
    gathers: int  # of each weight under ZeRO-3: forward, backward, and when it is computed again


@dataclass(frozen=True)
class Row:
    """One stage on so many GPUs. sent: bytes of a rank and step; states: bytes of a rank; compute,
    talk: seconds of a step; a step takes between the larger and the sum of the two."""

    stage: int
    gpus: int
    sent: float
    states: int
    compute: float
    talk: float

    @property
    def efficiency(self) -> tuple[float, float]:
        """Share of the step that computes: nothing hidden, all hidden."""
        return self.compute / (self.compute + self.talk), self.compute / max(self.compute, self.talk)


def openflamingo_9b() -> Work:
    """From the recipe; MPT-7B's sizes are written here, so that no network is needed."""
    from transformers import MptConfig

    with TemporaryDirectory() as folder:
        MptConfig(d_model=4096, n_heads=32, n_layers=32, vocab_size=50432).save_pretrained(folder)  # type: ignore
        recipe = read_recipe(RECIPE, [f"model.language={folder}"])
        model = assemble(recipe)
    held = asdict(held_by_step(recipe, model.config, {}, model.image_tokens))
    work = flops.step_flops(model, **held, recomputed=recipe.activation_checkpointing)
    trained = sum(parameters(model)[1].values())
    gathers = 3 if recipe.activation_checkpointing else 2
    encoder = bytes_of(model.vision_encoder, trained=False)  # type: ignore[arg-type]
    return Work(recipe, trained, bytes_of(model, trained=False), encoder, work, gathers)


def sent(work: Work, stage: int, ranks: int, parts: int) -> tuple[float, float]:
    """Bytes that a rank sends in a step of so many micro-batches, and collectives that it takes part in.

    An all-reduce of x bytes sends 2 (N - 1) / N x per rank, a gather or a reduce-scatter half of
    that. ZeRO-1 reduces once a step, ZeRO-2 and 3 in every micro-batch. ZeRO-1 and 2 all-reduce
    (`use_multi_rank_bucket_allreduce`), then gather the updated weights.
    """
    share, gradients = (ranks - 1) / ranks, FLOAT * work.trained
    buckets = math.ceil(work.trained / BUCKET)
    if stage == 0:
        return 2 * share * gradients, buckets
    if stage < 3:
        times = parts if stage == 2 else 1
        return share * gradients * (2 * times + 1), buckets * (times + 1)
    pieces = work.frozen - work.encoder
    elements = work.trained + pieces / 2  # the frozen part is bfloat16
    calls = work.gathers * math.ceil(elements / PREFETCH) + buckets
    return share * parts * (work.gathers * (pieces + gradients) + gradients), parts * calls


def row(work: Work, stage: int, gpus: int, grows: bool, machine: Machine) -> Row:
    """grows: the batch grows with the GPUs; otherwise it is the recipe's, whose micro-batches shrink
    beyond `HOME` GPUs and become more below."""
    parts = 1 if grows else max(1, HOME // gpus)
    flops_here = work.flops / HOME if grows else work.flops / gpus
    size, calls = sent(work, stage, gpus, parts)
    speed = (machine.inside if gpus <= machine.node else machine.between) * machine.reached
    talk = size / speed + calls * (gpus - 1) * machine.hop
    held = states(work.recipe, stage, gpus, parts, work.frozen, work.trained, work.encoder)
    return Row(stage, gpus, size, held.total, flops_here / (machine.peak * machine.utilisation), talk)


def table(work: Work, machine: Machine, grows: bool) -> Iterator[str]:
    """Lines of Markdown."""
    yield "| GPUs | compute | " + " | ".join(f"ZeRO-{stage}" for stage in STAGES) + " |"
    yield "|---:" * (len(STAGES) + 2) + "|"
    for gpus in GPUS:
        rows = [row(work, stage, gpus, grows, machine) for stage in STAGES]
        cells = [f"{r.talk:.2f} s, {r.efficiency[0]:.0%}–{r.efficiency[1]:.0%}" for r in rows]
        yield f"| {gpus:,} | {rows[0].compute:.2f} s | " + " | ".join(cells) + " |"


def sizes(work: Work, machine: Machine) -> Iterator[str]:
    """Memory and bytes sent, with one micro-batch a step; lines of Markdown."""
    yield "| GPUs | " + " | ".join(f"ZeRO-{stage}" for stage in STAGES) + " |"
    yield "|---:" * (len(STAGES) + 1) + "|"
    for gpus in GPUS:
        rows = [row(work, stage, gpus, True, machine) for stage in STAGES]
        cells = [f"{r.states / 2**30:.1f} GiB, {r.sent / 1e9:.1f} GB" for r in rows]
        yield f"| {gpus:,} | " + " | ".join(cells) + " |"


def limits(work: Work, machine: Machine) -> dict[int, int | None]:
    """Stage -> fewest GPUs, of powers of two, at which the recipe's own batch talks as long as it
    computes; None: beyond 65,536."""
    many = [2**n for n in range(3, 17)]
    return {
        stage: next((n for n in many if (r := row(work, stage, n, False, machine)).talk >= r.compute), None)
        for stage in STAGES
    }


def main() -> None:
    work, machine = openflamingo_9b(), Machine()
    print(f"trained {work.trained:,}; frozen {work.frozen:,} bytes; {work.flops:.4g} FLOPs\n")
    for title, lines in (
        ("States and bytes sent, per rank", sizes(work, machine)),
        ("The batch grows with the GPUs", table(work, machine, grows=True)),
        ("The batch is the recipe's", table(work, machine, grows=False)),
    ):
        print(f"{title}\n", *lines, sep="\n", end="\n\n")
    print(limits(work, machine))


if __name__ == "__main__":
    main()

"""A plan for people: a table on a terminal, plain lines in a pipe."""

from __future__ import annotations

from typing import TextIO

from rich import box
from rich.console import Console
from rich.table import Table

from flamingo.train.plan import GIB, ROOM, Option, Plan

COLUMNS = (
    "ZeRO",
    "accumulation",
    "documents",
    "frozen",
    "trained",
    "gradients",
    "optimizer",
    "buckets",
    "activations",
    "encoder, loss",
    "total",
)


def show(plan: Plan, file: TextIO | None = None) -> None:
    """Print a plan to standard output, or to `file`."""
    console = Console(file=file, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(file=file, highlight=False, soft_wrap=True, width=200)  # no line is broken
    for name, counts in (("frozen", plan.frozen), ("trained", plan.trained)):
        parts = ", ".join(f"{part} {_count(number)}" for part, number in counts.items())
        console.print(f"{name} parameters: {_count(sum(counts.values()))} ({parts})", markup=False)
    held = plan.held
    console.print(
        f"a step: {held.tokens:,} tokens, {held.targets:,} of them learned, {held.images:,} images; "
        f"{plan.flops:.3g} FLOPs of the model"
        + (f" and {plan.recomputed:.3g} computed again" if plan.recomputed else "")
    )
    console.print(
        f"memory of a rank in GiB, to be filled up to {ROOM * plan.gpu_memory:.1f} of {plan.gpu_memory:g}:"
    )
    console.print(_table(plan, console.is_terminal))
    best = plan.recommended
    if best:
        console.print(
            f"recommended: zero_stage={best.zero_stage} accumulation={best.accumulation}", markup=False
        )
    else:
        console.print("nothing fits. What helps, the cheapest first:")
        for way in plan.advice:
            console.print(f"- {way}", markup=False)
    console.print(
        f"time: {plan.step_seconds:.3g} s a step at {plan.utilisation:.0%} of {plan.peak / 1e12:.4g} TFLOP/s "
        f"({plan.peak_from}) on {plan.gpus} GPUs"
    )
    hours = plan.steps * plan.step_seconds / 3600
    console.print(f"cost: {plan.steps:,} steps in {hours:.3g} hours, {plan.gpu_hours:.4g} GPU-hours")
    images = ", ".join(f"{name} {number}" for name, number in plan.images.items())
    console.print(
        f"counted: documents of max_tokens tokens, all but images learned; images of a document: {images} "
        "(--images NAME=N changes it); nothing for communication, data, checkpoints",
        markup=False,
    )


def _table(plan: Plan, terminal: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD if terminal else None, pad_edge=False)
    host = any(option.states.host for option in plan.options)  # with `offload`
    for name in (*COLUMNS, *(["on the CPU"] if host else []), ""):
        table.add_column(name, justify="right", no_wrap=not terminal)
    for option in plan.options:
        best = option is plan.recommended
        style = "bold" if best else "" if option.fits else "dim"
        note = "<- recommended" if best else "" if option.fits else "too large"
        moved = [f"{option.states.host / GIB:.2f}"] if host else []
        table.add_row(*_row(option), *moved, note, style=style)
    return table


def _row(option: Option) -> list[str]:
    states, batch = option.states, option.batch
    sizes = (
        states.frozen,
        states.trained,
        states.gradients,
        states.optimizer,
        states.buffers,
        batch.activations,
        batch.buffers,
        option.total,
    )
    numbers = [str(n) for n in (option.zero_stage, option.accumulation, option.documents)]
    return [*numbers, *(f"{size / GIB:.2f}" for size in sizes)]


def _count(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return str(number)

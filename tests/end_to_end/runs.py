"""What two runs are compared by."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

KEPT = ("step", "loss", "lr", "grad_norm", "samples", "tokens")


def records(run: Path) -> list[dict]:
    """What was measured, of complete lines."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [{k: json.loads(line)[k] for k in KEPT} for line in lines if line.endswith("\n")]


def same(run: Path, other: Path, steps: int) -> None:
    """Every step is recorded once, with the same figures, and the models are the same to the bit."""
    assert [record["step"] for record in records(run)] == list(range(1, steps + 1))
    assert records(run) == records(other)
    one, two = (load_file(folder / "model" / "model.safetensors") for folder in (run, other))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)

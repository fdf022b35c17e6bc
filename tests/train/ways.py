"""What ranks do in `test_ways.py`."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from flamingo.train import checkpoint
from flamingo.train.engine import Engine, gather_objects, gathered, partitioned
from flamingo.train.flops import step_flops
from flamingo.train.loop import Trainer
from flamingo.train.nonfinite import NonFinite
from flamingo.train.parts import add_adapters, compile_parts
from tests.train.steps import engine_of, micro_batches, recipe, sum_over_ranks, take_step, weights


def losses_of_all(settings: list[dict[str, Any]], steps: int) -> list[list[float]]:
    """Losses of so many steps in each setting."""
    found = []
    for fields in settings:
        given = recipe(**fields)
        engine = engine_of(given)
        if given.activation_checkpointing:
            engine.module.model.gradient_checkpointing_enable()  # type: ignore[union-attr]
        if given.compile:
            compile_parts(engine.module.model)  # type: ignore[arg-type]
        found.append([take_step(engine, given, step)[0] for step in range(steps)])
        engine.close()
    return found


def flops_of_all(settings: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Of a step of each setting: with whole weights, and under ZeRO-3."""
    held = {"tokens": 100, "targets": 50, "images": 4, "pairs": 1000}
    found = []
    for fields in settings:
        flops = []
        for stage in (0, 3):
            engine = engine_of(recipe(**fields, zero_stage=stage))
            flops.append(step_flops(engine.module.model, **held))  # type: ignore[arg-type]
            engine.close()
        found.append((flops[0], flops[1]))
    return found


def clipped_of_all(settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a first step of each setting: the norm before clipping; of Adam's first moments the norm of the
    gradient that it was given; the largest change of a weight of each group."""
    found = []
    for fields in settings:
        given = recipe(**fields)
        engine = engine_of(given)
        before = weights(engine)
        _, _, norm = take_step(engine, given, 0)
        moments = [engine.moments.read(name)["exp_avg"].float() for name in engine.named]
        squares = sum(float(moment.square().sum()) for moment in moments)
        moved: dict[str, float] = {}
        for name, value in weights(engine).items():
            group = next((g for g in ("resampler", "added_tokens") if g in name), "blocks")
            moved[group] = max(moved.get(group, 0.0), float((value - before[name]).abs().max()))
        given_norm = squares**0.5 / (1 - given.optimizer.betas[0])
        found.append({"norm": norm, "given": given_norm, "moved": moved})
        engine.close()
    return found


def waits(seconds: float) -> list[dict[str, Any]]:
    """Records of two steps of a loop for which rank 1 waits for data; nothing is trained."""
    rank, told = torch.distributed.get_rank(), []

    def reading() -> Iterator[dict]:
        for _ in range(2):
            time.sleep(seconds * rank)
            yield {}

    trainer: Any = Trainer.__new__(Trainer)
    trainer.recipe = recipe(steps=2, blank_every=0, checkpoint_every=0)
    trainer.engine, trainer.dataset, trainer.company = mock.Mock(), mock.Mock(rank=rank), mock.Mock()
    trainer.train_step = lambda step, batches: {"step": step + 1}
    trainer.company.report = lambda recipe, record, batches: told.append(record)
    with mock.patch("flamingo.train.loop.step_loader", return_value=reading()):
        trainer.run(0, 2)
    return told


def all_spoilt(folder: str, cases: list[tuple[int, str]]) -> list[dict[str, Any]]:
    return [spoilt(f"{folder}/{stage}-{what}", stage, what) for stage, what in cases]


def spoilt(folder: str, stage: int, what: str) -> dict[str, Any]:
    """A step whose loss or gradient is not finite on rank 1 alone, and a good one after it."""
    given = recipe(zero_stage=stage)
    engine = engine_of(given)
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    take_step(engine, given, 0)
    before = weights(engine)
    ((batches, rows),) = micro_batches(1, rank, ranks, 1, 0)
    counts = dict(zip(("captions", "turns"), [100, 100], strict=True))
    loss, sums = engine(rows, counts)
    if rank == 1:
        loss = loss * float("nan") if what == "loss" else _bad_gradient(loss)
        sums = sums * float("nan") if what == "loss" else sums
    engine.backward(loss)
    local = dict(zip(counts, sums.tolist(), strict=True))
    losses = dict(zip(counts, sum_over_ranks(sums.clone()).tolist(), strict=True))
    norm, _ = engine.update(1e-2)
    watch = NonFinite(Path(folder), 1, rank)
    stepped = dict(zip(counts, ([batches[0]], [batches[1]]), strict=True))
    skipped = watch.note(2, losses, norm, local, stepped, engine.scale)
    same = all(torch.equal(value, before[name]) for name, value in weights(engine).items())
    message = ""
    try:
        watch.note(3, losses, norm, local, stepped, engine.scale)
    except ValueError as error:
        message = str(error)
    after = take_step(engine, given, 3)
    moved = any(not torch.equal(value, before[name]) for name, value in weights(engine).items())
    engine.close()
    return {"skipped": skipped, "same": same, "message": message, "after": after[0], "moved": moved}


class _Bad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0] * float("inf")


def _bad_gradient(loss: torch.Tensor) -> torch.Tensor:
    return _Bad.apply(loss)  # type: ignore[no-any-return]


def all_adapted(stages: list[int]) -> list[dict[str, Any]]:
    return [adapted(stage) for stage in stages]


def adapted(stage: int) -> dict[str, Any]:
    """Steps with adapters in the LM: what was trained, and whether the LM itself moved."""
    from flamingo.train.features import FeatureCache
    from flamingo.train.objective import Objective
    from flamingo.train.precision import LossScale
    from tests.train.steps import WEIGHTS
    from tests.train.tiny import tiny_model

    given = recipe(zero_stage=stage, lora={"rank": 2, "dropout": 0.1})
    model = tiny_model(0.05)
    assert given.lora
    add_adapters(model, given.lora)
    objective = Objective(model, WEIGHTS, FeatureCache(model, 0.0), torch.float32)
    engine = Engine(objective, given, torch.distributed.get_world_size(), LossScale.of(given.autocast))
    frozen = {n: p for n, p in objective.named_parameters() if not p.requires_grad and "language" in n}
    before = {name: _whole(p) for name, p in frozen.items()}
    adapters = {n: p for n, p in engine.named.items() if "lora_B" in n}
    for step in range(2):
        take_step(engine, given, step)
    after = weights(engine)
    return {
        "frozen": all(torch.equal(_whole(p), before[name]) for name, p in frozen.items()),
        "adapters": len(adapters),
        "moved": all(bool(after[name].any()) for name in adapters),
    }


def _whole(parameter: torch.nn.Parameter) -> torch.Tensor:
    with gathered([parameter]):
        return parameter.detach().clone()


def loaded_in_pieces(folder: str) -> dict[str, float]:
    """Bytes of anonymous memory that loading an LM took at most, and that its pieces take."""
    from transformers import AutoModelForCausalLM

    from flamingo.train.config import ModelConfig

    given = recipe(zero_stage=3).model_copy(
        update={"model": ModelConfig(vision="timm:x", language=folder, frozen_dtype="float32")}
    )
    most, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            most[0] = max(most[0], _anonymous())
            time.sleep(0.005)

    with partitioned(given, torch.distributed.get_world_size()):
        before = _anonymous()
        thread = threading.Thread(target=watch)
        thread.start()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        stop.set()
        thread.join()
    pieces = sum(p.ds_tensor.numel() * 4 for p in model.parameters())
    right = True
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    for name, parameter in model.named_parameters():
        right &= torch.equal(_whole(parameter), expected[name])
    return {"most": most[0] - before, "pieces": pieces, "right": right}


def _anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024


def writes_that_fail(folder: str) -> list[tuple[str, str, str]]:
    """(what failed, the message, the checkpoint that is then found, what is left) for every write."""
    given = recipe(zero_stage=1)
    engine = engine_of(given)
    found = []
    rank = torch.distributed.get_rank()
    for number, (name, target, error) in enumerate(FAILURES):
        place = Path(folder) / str(number)
        checkpoints = checkpoint.Checkpoints(place, given.identity(), background=number % 2 == 1)
        checkpoints.save(engine, 1)
        checkpoints.finish()
        message = ""
        broken = mock.patch(target, side_effect=error) if rank == 0 else mock.MagicMock()
        try:
            with broken:
                checkpoints.save(engine, 2)
                checkpoints.finish()
        except OSError as told:
            message = str(told)
        newest = checkpoint.newest(place, given.identity())
        left = sorted(path.name for path in place.iterdir())
        found.append((name, message, newest.name if newest else "", left))
        torch.distributed.barrier()
    engine.close()
    return found


NO_SPACE, NO_READING = OSError(28, "No space left on device"), OSError(5, "Input/output error")
FAILURES = [
    ("tensors, disk full", "flamingo.train.checkpoint.save_file", NO_SPACE),
    ("tensors, in the background", "flamingo.train.checkpoint.save_file", NO_READING),
    ("fsync", "flamingo.train.checkpoint.os.fsync", NO_READING),
    ("checksum", "flamingo.train.checkpoint.fingerprint", NO_READING),
    ("text", "pathlib.Path.write_text", NO_SPACE),
    ("folder", "pathlib.Path.mkdir", NO_SPACE),
    ("rename", "pathlib.Path.rename", NO_READING),
    ("folder's fsync", "flamingo.train.checkpoint.fsync_folder", NO_READING),
]


def written_beside_training(folder: str) -> tuple[list[str], list[str], list[str]]:
    """Checkpoints that are there: right after a background `save`, once it was polled, and after a
    run that keeps one and had gone back behind a damaged one."""
    place, given = Path(folder), recipe(zero_stage=1)
    engine = engine_of(given)

    def there() -> list[str]:
        return gather_objects([path.name for path in checkpoint.complete(place)])[0]

    writing, write = threading.Event(), checkpoint._write

    def slowly(*args: Any) -> None:
        writing.wait()
        write(*args)

    checkpoints = checkpoint.Checkpoints(place, given.identity(), keep=1, background=True)
    with mock.patch("flamingo.train.checkpoint._write", slowly):
        checkpoints.save(engine, 1)
        checkpoints.poll()
        first = there()
        writing.set()
        until = time.monotonic() + 60
        while not (polled := there()) and all(gather_objects(time.monotonic() < until)):
            checkpoints.poll()
    if torch.distributed.get_rank() == 0:
        (place / "step-000200").mkdir()
    checkpoint.Checkpoints(place, given.identity(), keep=1).save(engine, 150)
    found = first, polled, there()
    engine.close()
    return found

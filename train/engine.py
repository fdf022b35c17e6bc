"""The only door to DeepSpeed's engine, with `moments.py`.

Works with and without a launcher: one process alone is a group of one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from flamingo.names import hint
from flamingo.train import group
from flamingo.train.config import Recipe
from flamingo.train.exchange import Exchange
from flamingo.train.gauges import norms, squared_norms
from flamingo.train.moments import KEYS as KEYS
from flamingo.train.moments import STEP as STEP
from flamingo.train.moments import Moments
from flamingo.train.optim import adamw, trained
from flamingo.train.precision import LossScale


def join_group(hang_seconds: float = 0.0) -> tuple[int, int]:
    """Join the process group that the launcher announced: (rank, world size).

    hang_seconds: after which the watchdog speaks of a rank that hangs (0: never). So long the ranks wait
    for each other here; collectives wait longer, so that it is the watchdog that ends the run.

    Raises ValueError for ranks that contradict themselves or have no GPU, DistError where one does
    not come.
    """
    import deepspeed

    timeout = timedelta(seconds=4 * hang_seconds + 600) if hang_seconds else timedelta(days=7)
    if not torch.distributed.is_initialized():
        _meet(timedelta(seconds=hang_seconds) if hang_seconds else timeout, timeout)
    if not torch.cuda.is_available():
        # On a CPU, DeepSpeed compiles a shared-memory op that training never calls: that would
        # need a compiler, and half a minute at the first start.
        deepspeed.ops.__compatible_ops__ = {}  # type: ignore[attr-defined]
    deepspeed.init_distributed(_backend(), auto_mpi_discovery=False, verbose=False, timeout=timeout)
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _meet(come: timedelta, timeout: timedelta) -> None:
    """The ranks find each other, and that their devices are of one kind, before they wait in collectives."""
    me = group.member(os.environ)
    group.announce(me, os.environ)
    store, _, _ = next(rendezvous("env://", timeout=come))
    group.check_alike(me, torch.cuda.is_available(), store)
    store.set_timeout(timeout)  # later groups of ranks meet there, too
    if torch.cuda.is_available():
        group.check_device(me, torch.cuda.device_count())
        torch.cuda.set_device(me.local_rank)
    torch.distributed.init_process_group(
        _backend(), timeout=timeout, store=store, rank=me.rank, world_size=me.world
    )


def _backend() -> str:
    return "nccl" if torch.cuda.is_available() else "gloo"


def leave_group() -> None:
    """Part in order, so that no rank waits for one that has gone."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def device() -> torch.device:
    """This rank's accelerator, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


# What the recipe says in its own words; in `deepspeed` it would say it twice.
DERIVED = {
    "train_batch_size": "the batches of `sources`",
    "train_micro_batch_size_per_gpu": "the batches of `sources`",
    "gradient_accumulation_steps": "accumulation",
    "gradient_clipping": "optimizer.clip",
    "optimizer": "optimizer (AdamW)",
    "scheduler": "optimizer.schedule",
    "fp16": "autocast",
    "bf16": "autocast",
    "bfloat16": "autocast",
    "amp": "autocast",
    "torch_autocast": "autocast",
    "activation_checkpointing": "activation_checkpointing",
    "zero_optimization.stage": "zero_stage",
    "zero_optimization.offload_optimizer": "offload",
    "zero_optimization.offload_param": "offload",
    "zero_optimization.cpu_offload": "offload",
    "zero_optimization.cpu_offload_params": "offload",
    "zero_force_ds_cpu_optimizer": "optimizer (AdamW of torch)",
}


def configuration(recipe: Recipe, world: int) -> dict[str, Any]:
    """DeepSpeed's configuration, derived from the recipe, with its `deepspeed` section added.

    Weights of the trained part stay float32 (autocast does the rest), so DeepSpeed's own mixed
    precision is off: it would cast the frozen part too, and keep a copy of everything.

    Raises ValueError for a key of that section that the recipe says in its own words.
    """
    batch = sum(source.batch for source in recipe.sources)
    zero: dict[str, Any] = {"stage": recipe.zero_stage}
    if recipe.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if recipe.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    derived = {
        # DeepSpeed insists on these; `Objective` normalises by target tokens instead.
        "train_batch_size": batch - batch % (world * recipe.accumulation) or world * recipe.accumulation,
        "gradient_accumulation_steps": recipe.accumulation,
        # Without ZeRO the engine does not tell the norm that it clips: `Engine.update` does.
        "gradient_clipping": recipe.optimizer.clip if recipe.zero_stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its operator needs a compiler; torch's AdamW does not
        "steps_per_print": 1 << 30,
    }
    return _merged(derived, recipe.deepspeed)


def _merged(derived: dict[str, Any], raw: dict[str, Any], where: str = "") -> dict[str, Any]:
    for key, value in raw.items():
        name = f"{where}{key}"
        if name in DERIVED:
            raise ValueError(
                f"deepspeed.{name}={value!r} contradicts the recipe, which says it with {DERIVED[name]}: "
                "set that, and remove the key"
            )
        inner = derived.get(key)
        if isinstance(inner, dict) and not isinstance(value, dict):
            raise ValueError(
                f"deepspeed.{name}={value!r}: is a section; set a key of it, deepspeed.{name}.KEY"
            )
        derived[key] = _merged(inner, value, f"{name}.") if isinstance(inner, dict) else value
    return derived


class _Asked(dict):
    """Remembers which keys it was asked for, also by copies; so do the sections in it."""

    def __init__(self, fields: dict[str, Any]):
        super().__init__({key: _Asked(v) if isinstance(v, dict) else v for key, v in fields.items()})
        self.keys_asked: set[str] = set()

    def __contains__(self, key: Any) -> bool:
        self.keys_asked.add(key)
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.keys_asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_asked.add(key)
        return super().get(key, default)


# Sections that DeepSpeed reads key by key; those of the others it checks itself.
BY_KEY = ("aio", "checkpoint", "data_types", "flops_profiler")


def check_section(recipe: Recipe, world: int) -> None:
    """Raises ValueError for a `deepspeed` section that DeepSpeed refuses, or of which it reads only a part:
    it passes over keys that it does not know."""
    from deepspeed import DeepSpeedConfig

    read = _Asked(configuration(recipe, world))
    try:
        DeepSpeedConfig(read)
    except ValidationError as error:
        wrong = [(".".join(map(str, one["loc"])), one["msg"], one["input"]) for one in error.errors()]
        told = "; ".join(f"{key}: {why} (got {value!r})" for key, why, value in wrong)
        raise ValueError(f"deepspeed: DeepSpeed cannot use {recipe.deepspeed}: {told}") from error
    except Exception as error:  # of its own, or of whatever it did with the value
        raise ValueError(f"deepspeed: DeepSpeed cannot use {recipe.deepspeed}: {error}") from error
    _check_asked(read, recipe.deepspeed)
    for section in BY_KEY:
        if recipe.deepspeed.get(section):
            _check_asked(read[section], recipe.deepspeed[section], f"{section}.")


def _check_asked(read: _Asked, given: dict[str, Any], where: str = "") -> None:
    for key in given:
        if key not in read.keys_asked:
            asked = sorted(map(str, read.keys_asked))
            raise ValueError(f"deepspeed.{where}{key}: DeepSpeed has no such key; {hint(key, asked)}")


class Engine:
    """The objective under DeepSpeed: forward, backward, one update per step.

    Attributes:
        named: trained parameters; moments: of the optimizer, by the same names.
    """

    def __init__(self, objective: nn.Module, recipe: Recipe, world: int, scale: LossScale):
        import deepspeed

        self.stage, self.clip, self.world, self.scale = (
            recipe.zero_stage,
            recipe.optimizer.clip,
            world,
            scale,
        )
        self.module, self.device, self.offload = objective, device(), recipe.offload != "none"
        if self.stage == 3:
            _keep_encoder_whole(objective)
        optimizer = adamw(objective, recipe.optimizer)
        made = deepspeed.initialize(model=objective, optimizer=optimizer, config=configuration(recipe, world))
        self.deepspeed: Any = made[0]
        # Without ZeRO, DeepSpeed copies all gradients into one tensor and back, also of a rank alone. On
        # many GPUs that pays: each call waits for every hop, and one for each large gradient would be more.
        costs = world == 1 or self.device.type == "cpu"
        self.adds_up = costs and not self.stage and not recipe.deepspeed
        if self.adds_up:
            self.deepspeed.enable_backward_allreduce = False
        self.named = trained(objective)
        self.exchange = Exchange(self.named.values(), near=self.device.type == "cpu")
        self.moments = Moments(self.deepspeed, self.named, self.stage)

    def __call__(self, *args: Any) -> tuple[Tensor, Tensor]:
        return self.deepspeed(*args)

    def backward(self, loss: Tensor) -> None:
        """The gradients of all ranks are added up after the last micro-batch of a step; the objective
        already counts tokens of all ranks, so what DeepSpeed averages is made a sum again."""
        sound = torch.where(loss.detach().isfinite(), 1.0, torch.nan)
        loss = loss * sound  # no gradient is finite where the loss is not
        if self.stage:
            self.deepspeed.optimizer.override_loss_scale(self.scale.value)
        else:
            loss = loss * self.scale.value
        self.deepspeed.backward(loss if self.adds_up else loss * self.world, scale_wrt_gas=False)
        if self.adds_up and self.world > 1 and self.deepspeed.is_gradient_accumulation_boundary():
            self.exchange.add_up()

    def next_part(self) -> None:
        """After all but the last micro-batch of a step."""
        self.deepspeed.step()

    def update(self, rate: float) -> tuple[float, dict[str, float]]:
        """The one clipping and the one update of a step.

        Returns the norm of the gradient before, and that of each group of parameters; of groups nothing
        where the optimizer's state is offloaded, since the gradients are not at hand then.

        The gradients are already summed over the ranks, so all ranks do the same: nothing but
        forgetting the gradients where the norm is not finite.
        """
        for part in self.deepspeed.optimizer.param_groups:
            part["lr"] = rate * part["factor"]
        norm = float("nan")
        names, squares = ([], torch.zeros(0)) if self.offload else self._squares()
        if not self.stage:
            norm = float(squares.sum().sqrt())
            self._clip(norm)
        self.deepspeed.step()
        self.exchange.wait()  # all have read the gradients
        if self.stage and not self.deepspeed.optimizer.overflow:
            norm = float(self.deepspeed.get_global_grad_norm())  # type: ignore[arg-type]
        return norm, norms(names, squares)

    def _clip(self, norm: float) -> None:
        """Without ZeRO: as DeepSpeed's own optimizers do."""
        if norm != norm or norm == float("inf"):
            for parameter in self.named.values():
                parameter.grad = None  # the optimizer leaves these alone
        elif (factor := min(1.0, self.clip / (norm + 1e-6)) / self.scale.value) != 1.0:
            gradients = [p.grad for p in self.exchange.mine if p.grad is not None]
            torch._foreach_mul_(gradients, factor)  # type: ignore[attr-defined]
            self.exchange.wait()  # all gradients are clipped

    def rates(self, rate: float) -> dict[str, float]:
        """The learning rate of each group of parameters, where that of the run is `rate`."""
        return {part["name"]: rate * part["factor"] for part in self.deepspeed.optimizer.param_groups}

    def _squares(self) -> tuple[list[str], Tensor]:
        """Groups of parameters, and the sum of squares of the gradient of each, over all ranks."""
        groups = self.deepspeed.optimizer.param_groups
        pieces: dict[str, list[Tensor | None]] = {}
        for number, held in self._pieces():
            pieces.setdefault(groups[number]["name"], []).extend(held)
        squares = squared_norms(pieces, self.device)
        if self.stage or self.exchange.memory is not None:
            sum_over_ranks(squares)
        return list(pieces), squares / self.scale.value**2

    def _pieces(self) -> Iterator[tuple[int, list[Tensor | None]]]:
        """(number of a parameter group, gradients that this rank sees to of it)."""
        optimizer = self.deepspeed.optimizer
        if not self.stage:
            mine = {id(parameter) for parameter in self.exchange.mine}
            for number, part in enumerate(optimizer.param_groups):
                yield number, [parameter.grad for parameter in part["params"] if id(parameter) in mine]
            return
        for number, pieces in optimizer.averaged_gradients.items():
            owner = optimizer.sub_group_to_group_id[number] if self.stage == 3 else number
            yield owner, list(pieces or [])

    def close(self) -> None:
        """Give back what the engine holds; the module stays usable below ZeRO-3."""
        self.deepspeed.destroy()


def _keep_encoder_whole(objective: nn.Module) -> None:
    """Take the frozen encoder out of the modules that ZeRO-3 cuts into pieces: ranks run it for as
    many pictures as they have, and a module in pieces has to run equally often on all."""
    model: Any = objective.model
    if encoder := model._modules.pop("vision_encoder", None):
        model.__dict__["vision_encoder"] = encoder


@contextmanager
def partitioned(recipe: Recipe, world: int) -> Iterator[None]:
    """Within this `with`, transformers loads models in pieces over the ranks, under ZeRO-3."""
    if recipe.zero_stage < 3:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    # Here "bf16" says in what the pieces are kept.
    loading = {"bf16": {"enabled": recipe.model.frozen_dtype == "bfloat16"}}
    held = HfDeepSpeedConfig({**configuration(recipe, world), **loading})
    try:
        yield
    finally:
        del held
        unset_hf_deepspeed_config()


def gathered(parameters: Any, changed: bool = False) -> AbstractContextManager[Any]:
    """Within this `with` parameters are whole, also under ZeRO-3; changed: rank 0's changes stay."""
    listed = [p for p in parameters if hasattr(p, "ds_id")]
    if not listed:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(listed, modifier_rank=0 if changed else None)


def gather_objects(value: Any) -> list[Any]:
    """What every rank has, in the order of ranks, on every rank."""
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The same vector on every rank: the sum of all ranks' vectors."""
    torch.distributed.all_reduce(values)
    return values


def most_over_ranks(value: float) -> float:
    """The largest of all ranks' numbers."""
    found = torch.tensor(value, dtype=torch.float64, device=device())
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return float(found)

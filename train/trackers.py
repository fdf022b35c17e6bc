"""Where a run's figures go besides metrics.jsonl: TensorBoard, Weights & Biases, trackio.

A tracker is a class with `open`, `write` and `close`; `recipe.trackers` names it, or gives the
dotted path of a class elsewhere. Its package is imported when it is opened. A tracker must never
end a training: the first error of any is told once, and the run goes on without it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from flamingo.data.writing import write_text

IDS = "trackers.json"  # in the run's folder: what the services call this run


class Tracker(Protocol):
    """One place that figures go to, on rank 0.

    package: what must be importable, and extra: what installs it; both may be missing.
    """

    def open(self, run: Path, start: int, settings: Mapping[str, Any]) -> None:
        """Begin, or go on after step `start`; `settings` is the recipe. May fail with any error."""
        ...

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        """Figures of one step, e.g. {"loss/captions": 2.1}; must not wait for a network."""
        ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in RUN/tensorboard."""

    package: ClassVar[str] = "tensorboard"
    extra: ClassVar[str] = "train"

    def open(self, run: Path, start: int, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Records of the steps that are done again are dropped, as in metrics.jsonl.
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1, flush_secs=30)

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        for tag, value in scalars.items():
            self.board.add_scalar(tag, value, step)

    def close(self) -> None:
        self.board.close()


class WandB:
    """Weights & Biases; WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE are obeyed.

    Without an API key the figures are kept in RUN/wandb, for `wandb sync`: nobody is asked.
    """

    package: ClassVar[str] = "wandb"
    extra: ClassVar[str] = "wandb"

    def open(self, run: Path, start: int, settings: Mapping[str, Any]) -> None:
        import wandb

        alone = "WANDB_MODE" not in os.environ and not _logged_in(wandb)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "flamingo"),
            name=run.resolve().name,
            id=kept_id(run, "wandb", lambda: secrets.token_hex(4)),
            resume="allow",
            dir=str(run),
            config=dict(settings),
            mode="offline" if alone else None,
            # Its copy of the terminal would fight with the live view; a dead network must not
            # keep a finished run from ending.
            settings=wandb.Settings(console="off", finish_timeout=300.0),
        )
        self.first = self.run.step

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        # The service refuses steps that it has; done again, they have the same figures.
        if step >= self.first:
            self.run.log(dict(scalars), step=step)

    def close(self) -> None:
        self.run.finish()


def _logged_in(wandb: Any) -> bool:
    try:
        return bool(wandb.login(prompt=False))
    except wandb.errors.UsageError:
        return False


class Trackio:
    """trackio's local database; TRACKIO_PROJECT, TRACKIO_DIR and TRACKIO_SPACE_ID are obeyed.

    Steps that a resumed run does again are there twice, with the same figures.
    """

    package: ClassVar[str] = "trackio"
    extra: ClassVar[str] = "trackio"

    def open(self, run: Path, start: int, settings: Mapping[str, Any]) -> None:
        import trackio

        self.run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "flamingo"),
            # It finds runs by name, which another folder's run may have.
            name=kept_id(run, "trackio", lambda: f"{run.resolve().name}-{secrets.token_hex(2)}"),
            resume="allow",
            config=dict(settings),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        self.run.log(dict(scalars), step=step)

    def close(self) -> None:
        self.run.finish()


REGISTRY: dict[str, type[Any]] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}


def find(name: str) -> type[Any]:
    """The class of a tracker: by its short name, or by a dotted path ("my_lab.figures.Board").

    Raises ValueError when there is none; lists the choices.
    """
    if name in REGISTRY:
        return REGISTRY[name]
    choices = f"trackers are {', '.join(sorted(REGISTRY))}, or the dotted path of a class"
    module, _, attribute = name.rpartition(".")
    if not module:
        raise ValueError(f"unknown tracker {name!r}: {choices}")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there; something that it imports is not
        found = None
    if not isinstance(found, type) or not all(hasattr(found, m) for m in ("open", "write", "close")):
        raise ValueError(f"tracker {name!r}: no class with open, write and close is there; {choices}")
    return found


def check(names: Iterable[str]) -> None:
    """Before a run begins: every tracker exists, and so does the package that it needs.

    Raises ValueError that names what to install.
    """
    for name in names:
        kind = find(name)
        package, extra = getattr(kind, "package", None), getattr(kind, "extra", None)
        if package and importlib.util.find_spec(package) is None:
            how = f"pip install 'flamingo-vlm[{extra}]'" if extra else f"pip install {package}"
            raise ValueError(
                f"trackers: {name} needs the package {package}, which is not installed: "
                f"{how}, or take {name} out of trackers (metrics.jsonl is always written)"
            )


def kept_id(run: Path, name: str, make: Callable[[], str]) -> str:
    """What a service calls this run: made once, then read from the run's folder."""
    path = run / IDS
    try:
        held = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):  # none yet, or cut off: a new name loses no figure
        held = {}
    if not isinstance(held.get(name), str):
        held[name] = make()
        write_text(path, json.dumps(held, indent=1) + "\n")
    return held[name]


class Trackers:
    """All trackers of a run, as one. Errors never come out of it."""

    def __init__(
        self,
        names: Sequence[str],
        run: Path,
        start: int,
        settings: Mapping[str, Any],
        warn: Callable[[str], None],
    ):
        """warn: is told once for each tracker that fails."""
        self.warn, self.active = warn, {}
        for name in names:
            with self._guarded(name):
                self.active[name] = find(name)()
                self.active[name].open(run, start, settings)

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        for name in list(self.active):
            with self._guarded(name):
                self.active[name].write(scalars, step)

    def close(self) -> None:
        for name in list(self.active):
            with self._guarded(name):
                self.active[name].close()
        self.active.clear()

    @contextlib.contextmanager
    def _guarded(self, name: str):
        try:
            yield
        # SystemExit: some services end the process when they cannot log in.
        except (Exception, SystemExit) as error:
            self.active.pop(name, None)
            words = " ".join(str(error).split()) or "no message"
            self.warn(
                f"tracker {name} failed ({type(error).__name__}: {words}): the run goes on without "
                "it; metrics.jsonl has every figure, and --resume opens the tracker again"
            )

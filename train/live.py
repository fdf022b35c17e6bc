"""What a person sees of a run that goes on: a live view on a terminal, plain lines in a pipe.

Drawn twice a second by a thread of its own, so that a step only hands over its record. Nothing
here may end a training: a terminal that is gone is written to no more.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

BARS = "▁▂▃▄▅▆▇█"
REFRESH = 2.0  # times a second
HELD = 120  # points of a history
GATES = {"gate_attention": "attention gates", "gate_feed_forward": "feed-forward gates"}
LITTLE = 0.05  # of the blank loss: a smaller distance is called none, as in reports


class View(Protocol):
    def update(self, record: Mapping[str, Any]) -> None:
        """One step's record, as in metrics.jsonl."""
        ...

    def say(self, text: str) -> None:
        """A line that stays."""
        ...

    def close(self) -> None: ...


def view(title: str, steps: int, start: int) -> View:
    """The live view where stderr is a terminal that can move its cursor, else plain lines."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveView(title, steps, start, console)
    return PlainView(steps, start)


# ---- words ---------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """3725 -> 1 h 02 min"""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours / 24:.1f} days"


def sparkline(
    values: Sequence[float], width: int, low: float | None = None, high: float | None = None
) -> str:
    """Bars of at most `width` characters, means of equal stretches; gaps where nothing is finite."""
    if not values or width < 1:
        return ""
    count = min(width, len(values))
    cuts = [round(i * len(values) / count) for i in range(count + 1)]
    stretches = [[v for v in values[a:b] if math.isfinite(v)] for a, b in zip(cuts, cuts[1:], strict=False)]
    means = [sum(part) / len(part) if part else None for part in stretches]
    known = [mean for mean in means if mean is not None]
    if not known:
        return ""
    bottom = min(known) if low is None else low
    span = (max(known) if high is None else high) - bottom
    scale = (len(BARS) - 1) / span if span > 0 else 0.0
    places = [None if m is None else round((m - bottom) * scale) for m in means]
    return "".join(" " if p is None else BARS[min(max(p, 0), len(BARS) - 1)] for p in places)


class History:
    """A course in at most `HELD` points, however long: pairs are averaged when it is full."""

    def __init__(self):
        self.points: list[float] = []
        self.stride, self.open = 1, []

    def add(self, value: float) -> None:
        self.open.append(value)
        if len(self.open) < self.stride:
            return
        self.points.append(sum(self.open) / len(self.open))
        self.open = []
        if len(self.points) == HELD:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [(one + other) / 2 for one, other in pairs]
            self.stride *= 2


class Pace:
    """How long what is left will take, from the steps of this process."""

    def __init__(self, steps: int, start: int, clock: Callable[[], float] = time.monotonic):
        self.steps, self.start, self.clock, self.began = steps, start, clock, clock()

    def left(self, step: int) -> float | None:
        """Seconds, None before the first step."""
        done = step - self.start
        return (self.clock() - self.began) / done * (self.steps - step) if done > 0 else None


# ---- a pipe --------------------------------------------------------------------------------------


class PlainView:
    """A line at every tenth of the run, on stdout."""

    def __init__(self, steps: int, start: int):
        self.steps, self.every, self.last = steps, max(1, steps // 10), start
        self.pace = Pace(steps, start)
        self.blank: dict[str, float] = {}

    def update(self, record: Mapping[str, Any]) -> None:
        step = record["step"]
        self.blank |= record.get("loss_blank") or {}
        passed, self.last = step // self.every > self.last // self.every, step
        if not passed and step != self.steps:
            return
        losses = " ".join(f"{name} {_loss(value)}" for name, value in record["loss"].items())
        blank = " ".join(f"{name} {_loss(value)}" for name, value in self.blank.items())
        minutes = (self.pace.left(step) or 0.0) / 60
        said = f"step {step}/{self.steps}  loss {losses or '-'}" + (f"  blank {blank}" if blank else "")
        self.say(f"{said}  about {minutes:.0f} min left")

    def say(self, text: str) -> None:
        try:
            print(text, flush=True)
        except OSError:  # the reader has gone; the run goes on, and ends with its own status
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def close(self) -> None:
        pass


def _loss(value: float | None) -> str:
    """None where a loss was not finite: JSON has no such numbers."""
    return "-" if value is None else f"{value:.3f}"


# ---- a terminal ----------------------------------------------------------------------------------


class LiveView:
    """A few lines that are drawn again and again; what else is printed scrolls by above them."""

    def __init__(self, title: str, steps: int, start: int, console: Any, refresh: float = REFRESH):
        from rich.live import Live

        self.title, self.steps, self.step = title, steps, start
        self.pace = Pace(steps, start)
        self.record: dict[str, Any] = {}
        self.blank: dict[str, tuple[float, float]] = {}  # source -> loss of the same batches, blanked
        self.history: dict[str, History] = {}
        self.streams = sys.stdout, sys.stderr
        self.console = console
        self.live = Live(
            console=console, get_renderable=self.render, refresh_per_second=refresh, transient=False
        )
        self._quietly(self.live.start)
        # A run that is killed cannot bring a hidden cursor back.
        self._quietly(lambda: self.console.show_cursor(True))
        forget = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _leave(forget()))

    def update(self, record: Mapping[str, Any]) -> None:
        self.record, self.step = dict(record), record["step"]
        for name, value in record["loss"].items():
            if value is not None:
                self.history.setdefault(name, History()).add(value)
        for name, value in (record.get("loss_blank") or {}).items():
            beside = record["loss"].get(name)
            if value is not None and beside is not None:
                self.blank[name] = beside, value

    def say(self, text: str) -> None:
        from rich.text import Text

        self._quietly(lambda: self.console.print(Text(text)))

    def close(self) -> None:
        self._quietly(self.live.stop)

    def _quietly(self, act: Callable[[], None]) -> None:
        try:
            act()
        except OSError:  # the terminal has gone; the run goes on
            sys.stdout, sys.stderr = self.streams

    # -- drawing, in the thread of the view --

    def render(self) -> Any:
        """The lines, as wide as the terminal is now."""
        from rich.console import Group

        return Group(self._progress(), *self._table())

    def _progress(self) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        left = self.pace.left(self.step)
        words = f"step {self.step:,}/{self.steps:,}"
        seconds = self.record.get("seconds")
        more = [f"{seconds:.2f} s/step"] if seconds else []
        more.append("starting" if left is None else f"{duration(left)} left" if left else "done")
        width = self.console.width
        if width < 70:
            return Text("  ".join([words, *more]), no_wrap=True, overflow="ellipsis")
        bar = ProgressBar(total=self.steps, completed=self.step, width=max(10, min(40, width - 60)))
        grid = Table.grid(padding=(0, 2))
        title = Text(self.title, style="bold", no_wrap=True, overflow="ellipsis")
        grid.add_row(title, Text(words), bar, Text("  ".join(more), no_wrap=True))
        return grid

    def _table(self) -> list[Any]:
        from rich.table import Table
        from rich.text import Text

        rows = [*self._losses(), *self._gates(), *self._optimizer(), *self._machine()]
        if not rows:
            return []
        grid = Table.grid(padding=(0, 2))
        label_width = self._label_width()
        grid.add_column(no_wrap=True, overflow="ellipsis", min_width=label_width, max_width=label_width)
        grid.add_column(no_wrap=True, overflow="ellipsis")
        for label, words in rows:
            grid.add_row(Text(label, style="dim"), words if isinstance(words, Text) else Text(words))
        return [grid]

    def _label_width(self) -> int:
        longest = max([len(GATES["gate_feed_forward"]), *map(len, list(self.history))])
        return min(longest, 24 if self.console.width >= 80 else 10)

    def _losses(self) -> list[tuple[str, Any]]:
        from rich.text import Text

        width = self.console.width - self._label_width() - 2
        room = max(0, min(32, width - 52))  # 52: the words of the line
        rows = []
        for name, history in list(self.history.items()):
            now = self.record.get("loss", {}).get(name)
            words = Text(f"loss {_loss(now):>7}  ")
            words.append(f"{sparkline(list(history.points), room):<{room}}", style="cyan")
            if name in self.blank:
                beside, blank = self.blank[name]
                looks = blank - beside >= LITTLE * abs(blank)
                words.append(f"  blank {blank:.3f} ")
                words.append(f"({blank - beside:+.3f}) " if width >= 52 else "")
                words.append("looks" if looks else "does not look", "green" if looks else "yellow")
            rows.append((name, words))
        return rows

    def _gates(self) -> list[tuple[str, str]]:
        room = max(0, min(32, self.console.width - 46))
        rows = []
        for key, label in (
            ("gate_attention", "attention gates"),
            ("gate_feed_forward", "feed-forward gates"),
        ):
            values = [abs(value) for value in self.record.get(key) or []]
            if values:
                bars = sparkline(values, room, low=0.0, high=1.0)
                rows.append((label, f"{bars}  {min(values):.3f} to {max(values):.3f}"))
        return rows

    def _optimizer(self) -> list[tuple[str, str]]:
        words = []
        rate, norm = self.record.get("lr"), self.record.get("grad_norm")
        if rate is not None:
            words.append(f"{rate:.2e}")
        own = self.record.get("lrs", {})
        words += [f"{name} {value:.2e}" for name, value in own.items() if value != rate]
        if norm is not None:
            words.append(f"gradient norm {norm:.3g}")
        return [("learning rate", "  ".join(words))] if words else []

    def _machine(self) -> list[tuple[str, str]]:
        record = self.record
        rates = [
            f"{record[f'{name}_per_second']:,.{1 if record[f'{name}_per_second'] < 100 else 0}f} {name}/s"
            for name in ("samples", "tokens", "images")
            if f"{name}_per_second" in record
        ]
        shares = [
            f"{words} {100 * record[key]:.0f} %"
            for key, words in (("data_share", "waits for data"), ("padding_share", "padding"))
            if record.get(key) is not None
        ]
        device = [f"memory {record['memory_gb']:.2f} GB"] if record.get("memory_gb") is not None else []
        if record.get("flops_per_second") is not None:
            device.append(f"model {record['flops_per_second'] / 1e12:.3g} TFLOP/s")
        if record.get("peak_share") is not None:
            device.append(f"{100 * record['peak_share']:.0f} % of the measured peak")
        named = (("speed", rates), ("time", shares), ("device", device))
        return [(label, "  ".join(words)) for label, words in named if words]


def _leave(view: LiveView | None) -> None:
    """In a forked process (a data loader): print as if there were no view.

    Its thread is not there, and its lock may have been held when the process forked.
    """
    if view is not None and view.live.is_started:
        sys.stdout, sys.stderr = view.streams

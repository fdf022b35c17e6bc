"""A rank that hangs is named, and the run ends, instead of all others waiting for it for ever.

A run beats at every phase, from loading to the export; a thread per rank watches the time since the
last beat and publishes the beat at the store where the ranks met. When it is overdue, every rank
writes its stacks to RUN/watchdog-rankN.txt and ends with status 70 (EX_SOFTWARE of sysexits.h); the
first says which ranks are behind, and what each was doing. Nothing is watched before the first beat.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

STATUS = 70
PATIENCE = 4.0  # times as long as usual: a first step, loading, a checkpoint
COLLECTIVES = os.path.join("torch", "distributed", "distributed_c10d.py")
NAMED = 8  # groups of ranks that a message names
STORE_SECONDS = 30.0


class Beat(NamedTuple):
    """changes: of step or phase so far; all ranks go through the same, so it tells who is behind."""

    changes: int
    step: int
    phase: str
    time: float
    patience: float


class Watchdog:
    """Watches this rank from `start` to `close`; a context manager.

    Args:
        run: folder of the run.
        rank, world: of this process.
        seconds: without a beat, after which the run ends; 0: never.
        store: where the ranks tell each other; None: at MASTER_ADDR and MASTER_PORT, once joined.
    """

    def __init__(self, run: Path, rank: int, world: int, seconds: float, store: Store | None = None) -> None:
        self.run, self.rank, self.world, self.seconds = run, rank, world, seconds
        self._store = store
        self._beat: Beat | None = None
        self._interval = min(5.0, seconds / 4)
        self._said = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, step: int, phase: str, patience: float = 1.0) -> None:
        """This rank begins a phase, or is getting on within one that takes long (evaluation, writing).

        patience: times as long as usual until the next beat; PATIENCE for what takes long.
        """
        last = self._beat
        same = last is not None and (last.step, last.phase) == (step, phase)
        changes = (last.changes if last else 0) + (not same)
        self._beat = Beat(changes, step, phase, time.monotonic(), patience)
        if last is None and self._thread.is_alive():
            self._tell()  # the thread may never get to it

    def start(self) -> Watchdog:
        """After the ranks have met. Raises nothing: without the store, ranks report for themselves."""
        if self.seconds:
            if self.world > 1 and self._store is None:
                with contextlib.suppress(Exception):
                    self._store = _meeting_point()
            self._thread.start()
        return self

    def close(self) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def __enter__(self) -> Watchdog:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def overdue(self) -> float | None:
        """Seconds since the last beat when these are too many, None otherwise."""
        beat = self._beat
        age = time.monotonic() - beat.time if beat else 0.0
        return age if beat and self.seconds and age > self.seconds * beat.patience else None

    def _watch(self) -> None:
        try:
            while not self._end.wait(self._interval):
                if (age := self.overdue()) is not None:
                    self._bark(age)
                self._tell()
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _tell(self) -> None:
        """That this rank lives: to the others, and to the last resort.

        Code that holds the interpreter's lock stops our thread too. Then faulthandler's own, which
        is not Python, says where it hangs and ends the process with status 1.
        """
        if beat := self._beat:
            self._publish()
            longest = self.seconds * beat.patience * 1.5 + 2 * self._grace
            faulthandler.dump_traceback_later(longest, exit=True, file=sys.__stderr__ or 2)

    # -- when it is overdue ----------------------------------------------------------------

    @property
    def _grace(self) -> float:
        """Seconds in which the others, who beat a little later, are overdue as well."""
        return 2 * self._interval + 1

    def _bark(self, age: float) -> None:
        """Write, tell, end the process. The store may be gone with rank 0: never wait for it."""
        try:
            self._publish()
            self._write_stacks(age)
            if self._first():
                self._say(self._gather())
                self._set("said", "1")
            elif not self._wait_for("said"):
                self._say({self.rank: self._state()})
            if self.rank == 0:  # the store may live here: let the others read
                time.sleep(min(2.0, self._interval))
        except Exception as error:  # a full disk, say: it must end all the same
            print(f"error: watchdog of rank {self.rank}: {error!r}", file=sys.stderr)
        finally:
            sys.stderr.flush()
            os._exit(STATUS)

    def _write_stacks(self, age: float) -> None:
        beat = self._beat
        assert beat
        with (self.run / f"watchdog-rank{self.rank}.txt").open("w") as file:
            file.write(
                f"rank {self.rank} of {self.world}, host {socket.gethostname()}, process {os.getpid()}\n"
                f"step {beat.step}, {beat.phase}: no beat for {age:.1f} s, more than "
                f"{self._allowed(beat)}\n\n"
            )
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    def _allowed(self, beat: Beat) -> str:
        longer = f", {beat.patience:g} times as long for {beat.phase}" if beat.patience != 1 else ""
        return f"{self.seconds * beat.patience:g} s (watchdog_seconds={self.seconds:g}{longer})"

    def _say(self, states: dict[int, dict[str, Any]]) -> None:
        behind, others = split(states)
        assert self._beat
        unknown = sorted(set(range(self.world)) - states.keys())
        lines = [f"no beat for {self._allowed(self._beat)}: the run hangs and ends, status {STATUS}"]
        lines += [f"  hangs: {line}" for line in described(behind)]
        lines += [f"  waits: {line}" for line in described(others)]
        lines += [f"  never heard of: {short(unknown)}"] if unknown else []
        lines.append(f"  stacks: {self.run}/watchdog-rank*.txt")
        print("error: watchdog: " + "\n".join(lines), file=sys.stderr, flush=True)

    # -- what ranks tell each other --------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        beat = self._beat
        assert beat
        where, waits = doing()
        return {
            "changes": beat.changes,
            "step": beat.step,
            "phase": beat.phase,
            "where": where,
            "waits": waits,
            "said": self._said,
        }

    def _publish(self) -> None:
        if self._beat:
            self._said += 1
            self._set(str(self.rank), json.dumps(self._state()))

    def _gather(self) -> dict[int, dict[str, Any]]:
        """The state of every rank that ever told it, after a grace; `silent`: of those that no longer do."""
        first = self._read_all()
        time.sleep(self._grace)
        self._publish()
        states = self._read_all() or {self.rank: self._state()}
        for rank, state in states.items():
            state["silent"] = (
                rank in first and first[rank]["said"] == state["said"] and not self._has(f"fired/{rank}")
            )
        return states

    def _first(self) -> bool:
        """Whether this rank is the first that is overdue: it speaks for all."""
        if self._store is None:
            return True
        self._set(f"fired/{self.rank}", "1")
        with contextlib.suppress(Exception):
            return self._store.add(_key("fired"), 1) == 1
        return False

    def _read_all(self) -> dict[int, dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}
        with contextlib.suppress(Exception):
            for rank in range(self.world):
                if self._store is not None and self._has(str(rank)):
                    found[rank] = json.loads(self._store.get(_key(str(rank))))
        return found

    def _wait_for(self, name: str) -> bool:
        until = time.monotonic() + 2 * self._grace
        while not (there := self._has(name)) and time.monotonic() < until:
            time.sleep(0.1)
        return there

    def _has(self, name: str) -> bool:
        with contextlib.suppress(Exception):
            return self._store is not None and self._store.check([_key(name)])
        return False

    def _set(self, name: str, value: str) -> None:
        if self._store is not None:
            with contextlib.suppress(Exception):
                self._store.set(_key(name), value)


def doing() -> tuple[str, bool]:
    """Where this process is, in words, and whether it waits for other ranks in a collective."""
    frames = sys._current_frames()
    own = threading.get_ident()
    waits = False
    for thread, frame in frames.items():
        while thread != own and frame is not None:
            waits |= frame.f_code.co_filename.endswith(COLLECTIVES)
            frame = frame.f_back
    innermost = frames.get(threading.main_thread().ident or 0)
    ours = innermost
    while ours is not None and f"{os.sep}flamingo{os.sep}" not in ours.f_code.co_filename:
        ours = ours.f_back
    places = dict.fromkeys(_place(frame) for frame in (ours, innermost) if frame is not None)
    return " -> ".join(places), waits


def split(states: dict[int, dict[str, Any]]) -> tuple[dict[int, Any], dict[int, Any]]:
    """The ranks that hold up the run, and those that wait for them.

    Behind are those that have gone through the fewest phases; among equals, those that are in no
    collective. When all are (a broken network), nobody waits: all are named.
    """
    least = min(state["changes"] for state in states.values())
    behind = {rank: state for rank, state in states.items() if state["changes"] == least}
    busy = {rank: state for rank, state in behind.items() if not state["waits"] or state.get("silent")}
    behind = busy or behind
    return behind, {rank: state for rank, state in states.items() if rank not in behind}


def described(states: dict[int, dict[str, Any]]) -> list[str]:
    """One line for all ranks that do the same."""
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for rank, state in sorted(states.items()):
        silent = ", and its process no longer answers" if state.get("silent") else ""
        groups[f"step {state['step']}, {state['phase']}: in {state['where']}{silent}"].append(rank)
    lines = [f"rank{'s' * (len(ranks) > 1)} {short(ranks)}, {words}" for words, ranks in groups.items()]
    return lines[:NAMED] + ([f"{len(lines) - NAMED} more groups of ranks"] if lines[NAMED:] else [])


def short(ranks: Iterable[int]) -> str:
    """0, 1, 2, 5 -> 0-2, 5."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    return ", ".join("-".join(map(str, run)) for run in runs)


def _place(frame: Any) -> str:
    code = frame.f_code
    return f"{code.co_name} ({os.path.basename(code.co_filename)}:{frame.f_lineno})"


def _key(name: str) -> str:
    """torchrun's store outlives a restart, what it said before must not."""
    return f"flamingo/watchdog/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}"


def _meeting_point() -> Store:
    """A connection of our own: the group's is busy for as long as a rank waits in it."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=STORE_SECONDS))

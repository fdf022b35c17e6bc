"""What a person sees: on terminals of all widths, in pipes, and when either goes away."""

from __future__ import annotations

import io
import math
import os
import pty
import select
import subprocess
import sys
import time

import pytest
from rich.console import Console

from flamingo.train import live
from flamingo.train.live import History, LiveView, Pace, PlainView, duration, sparkline


def record(step: int, blank: float | None = None) -> dict:
    loss = {"captions": 3.0 / step, "questions": 1.0}
    made = {
        "step": step,
        "loss": loss,
        "lr": 3e-4,
        "grad_norm": 1.25,
        "gate_attention": [0.5, -0.6],
        "gate_feed_forward": [0.5, 0.5],
        "seconds": 1.5,
        "samples_per_second": 10.66,
        "tokens_per_second": 1320.4,
        "images_per_second": 25.1,
        "data_share": 0.02,
        "padding_share": 0.08,
        "memory_gb": 2.314,
        "flops_per_second": 3.2e11,
        "peak_share": 0.61,
    }
    if blank is not None:
        made["loss_blank"] = {name: value + blank for name, value in loss.items()}
    return made


def screen(width: int, records: list[dict], steps: int = 100) -> list[str]:
    """The lines of the view on a terminal so wide."""
    shown = LiveView("first", steps, 0, Console(file=io.StringIO(), force_terminal=True, width=width))
    for given in records:
        shown.update(given)
    paper = Console(file=io.StringIO(), width=width)
    paper.print(shown.render())
    shown.close()
    return paper.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_a_terminal_shows_every_figure():
    text = "\n".join(screen(120, [record(1, blank=1.0), record(2)]))
    for words in (
        "step 2/100",
        "1.50 s/step",
        "left",
        "captions",
        "loss   1.500",
        "█▁",
        "blank 4.000 (+1.000) looks",
        "0.500 to 0.600",
        "3.00e-04",
        "gradient norm 1.25",
        "10.7 samples/s  1,320 tokens/s  25.1 images/s",
        "waits for data 2 %  padding 8 %",
        "memory 2.31 GB  model 0.32 TFLOP/s  61 % of the measured peak",
    ):
        assert words in text


def test_it_says_where_the_model_does_not_look():
    lines = screen(120, [record(1, blank=0.04)])
    (questions,) = [line for line in lines if line.startswith("questions")]
    assert "blank 1.040 (+0.040) does not look" in questions


@pytest.mark.parametrize("width", [1, 8, 20, 40, 60, 79, 200])
def test_no_terminal_is_too_narrow(width):
    lines = screen(width, [record(1, blank=1.0), record(2)])
    assert lines and all(len(line) <= width for line in lines)
    assert len(lines) < 24, "more lines than a terminal has"


@pytest.mark.parametrize(
    "given",
    [
        {"step": 1, "loss": {}},
        {"step": 1, "loss": {"captions": None}, "grad_norm": None, "lr": 1e-3, "lrs": {"gates": 1e-2}},
        {"step": 1, "loss": {"[red]x[/red]": 1.0}, "loss_blank": {"other": 2.0}, "peak_share": None},
    ],
)
def test_a_record_with_gaps_is_drawn(given):
    text = "\n".join(screen(100, [given]))
    assert "step 1/100" in text
    assert all(name in text for name in given["loss"] if given["loss"][name] is not None)


def test_before_the_first_step_it_is_starting():
    assert "starting" in screen(100, [])[0]


SCRIPT = """
import os, sys, time, warnings
sys.argv[0] = "flamingo"  # as from the command line, where `import flamingo` loads no model code
from flamingo.train.live import view
shown = view("first", 40, 0)
print(type(shown).__name__, flush=True)
for step in range(1, 41):
    shown.update({"step": step, "loss": {"captions": 3.0 / step}, "seconds": 0.02})
    if step == 10:
        warnings.warn("a warning of a library")
        os.write(2, b"words past Python\\n")
    if step == 20:
        shown.say("a line that stays [with brackets]")
        if os.fork() == 0:
            print("from a forked process", file=sys.stderr, flush=True)
            os._exit(0)
        os.wait()
    if step == 30:
        MORE
    time.sleep(0.02)
shown.close()
print("after", file=sys.stderr)
"""


def on_terminal(script: str, hang_up: bool = False) -> tuple[int, str]:
    """The status of a process whose terminal is a pseudo one, and all that it wrote there."""
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.DEVNULL,
        stdout=slave,
        stderr=slave,
        env=environment,
        start_new_session=True,
    )
    os.close(slave)
    seen, until = b"", time.monotonic() + 60
    while time.monotonic() < until:
        if select.select([master], [], [], 0.1)[0]:
            try:
                block = os.read(master, 65536)
            except OSError:  # the last writer has gone
                break
            seen += block
            if hang_up and b"a line that stays" in seen:
                break
    os.close(master)
    return process.wait(60), seen.decode(errors="replace")


def test_a_terminal_survives_warnings_and_other_processes():
    status, seen = on_terminal(SCRIPT.replace("MORE", "print('printed')"))
    assert status == 0
    for words in (
        "LiveView",
        "a warning of a library",
        "words past Python",
        "a line that stays [with brackets]",
        "from a forked process",
        "printed",
        "step 40/40",
        "after",
    ):
        assert words in seen


def test_a_run_that_is_killed_leaves_the_cursor_visible():
    status, seen = on_terminal(SCRIPT.replace("MORE", "os.kill(os.getpid(), 9)"))
    assert status == -9 and "step 2" in seen
    assert seen.rindex("\x1b[?25h") > seen.rindex("\x1b[?25l")


def test_a_run_whose_terminal_is_closed_goes_on(tmp_path):
    done = tmp_path / "done"
    script = SCRIPT.replace('print("after", file=sys.stderr)', f"open({str(done)!r}, 'w').close()")
    on_terminal(script.replace("MORE", "shown.say('to nobody')"), hang_up=True)
    assert done.exists()


def test_it_is_drawn_by_a_thread_and_not_by_the_steps():
    paper = io.StringIO()
    shown = LiveView("first", 9, 0, Console(file=paper, force_terminal=True, width=80), refresh=0.001)
    drawn = len(paper.getvalue())
    for step in range(1, 9):
        shown.update(record(step))
    assert len(paper.getvalue()) == drawn
    shown.close()
    assert len(paper.getvalue()) > drawn
    assert live.REFRESH <= 4


def test_a_pipe_gets_a_line_at_every_tenth(capsys):
    shown = PlainView(100, 0)
    for step in range(1, 101):
        shown.update(record(step, blank=1.0 if step == 15 else None))
    shown.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == [f"{step}/100" for step in range(10, 101, 10)]
    assert lines[0].startswith("step 10/100  loss captions 0.300 questions 1.000  about ")
    assert "  blank captions 1.200 questions 2.000  about" in lines[1]
    assert lines[-1].endswith("about 0 min left")


def test_steps_that_are_not_reported_do_not_swallow_the_lines(capsys):
    shown = PlainView(100, 50)  # a resumed run that reports every seventh step
    for step in range(56, 101, 7):
        shown.update(record(step))
    steps = [int(line.split()[1].split("/")[0]) for line in capsys.readouterr().out.splitlines()]
    assert steps == [63, 70, 84, 91]


def test_in_a_pipe_the_view_is_plain_and_may_lose_its_reader(tmp_path):
    done = tmp_path / "done"
    script = SCRIPT.replace('print("after", file=sys.stderr)', f"open({str(done)!r}, 'w').close()")
    process = subprocess.Popen(
        [sys.executable, "-c", script.replace("MORE", "pass")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"PlainView\n"
    process.stdout.close()
    assert process.wait(60) == 0 and done.exists()


@pytest.mark.parametrize(
    ("values", "width", "bars"),
    [
        ([], 9, ""),
        ([1.0], 9, "▁"),
        ([0.0, 7.0], 9, "▁█"),
        ([0, 1, 2, 3, 4, 5, 6, 7], 8, "▁▂▃▄▅▆▇█"),
        ([0, 0, 7, 7], 2, "▁█"),
        ([5, 5, 5], 3, "▁▁▁"),
        ([0.0, math.nan, 7.0], 3, "▁ █"),
        ([math.nan], 3, ""),
        ([1.0, 2.0], 0, ""),
    ],
)
def test_sparkline(values, width, bars):
    assert sparkline(values, width) == bars


def test_a_scale_may_be_given():
    assert sparkline([0.0, 0.5, 2.0], 3, low=0.0, high=1.0) == "▁▅█"


def test_a_history_keeps_its_shape_and_not_its_length():
    history = History()
    for number in range(100_000):
        history.add(float(number))
    assert len(history.points) <= live.HELD
    assert history.points == sorted(history.points)
    assert history.points[0] < 2_000 and history.points[-1] > 96_000


def test_what_is_left_is_told_from_the_steps_of_this_process():
    now = [100.0]
    pace = Pace(100, 50, clock=lambda: now[0])
    assert pace.left(50) is None
    now[0] += 20.0
    assert pace.left(60) == pytest.approx(80.0)  # ten of fifty steps in 20 s


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(4.4, "4 s"), (75, "1 min 15 s"), (3725, "1 h 02 min"), (500_000, "5.8 days")],
)
def test_duration(seconds, words):
    assert duration(seconds) == words

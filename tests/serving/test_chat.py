"""`flamingo chat`: turns, pictures, commands, pipes and Ctrl-C."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from flamingo.cli import app
from flamingo.serving.chat import Chat
from flamingo.serving.engine import Engine
from flamingo.serving.prompt import Prompt, Sampling
from flamingo.serving.styles import Message, written
from flamingo.serving.terminal import Terminal, paths
from tests.eval.harness_model import picture, write_model

SAMPLING = Sampling(max_new_tokens=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    write_model(folder / "model")
    picture(1).save(folder / "one.png")
    picture(2).save(folder / "with blanks.png")
    (folder / "bad.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine(folder / "model")


@pytest.fixture
def chat(engine: Engine) -> Chat:
    return Chat(engine, sampling=SAMPLING)


def said(chat: Chat, question: str) -> str:
    return list(chat.ask(question))[-1].text


def test_turns_are_written_as_in_training_and_answered_as_such(chat: Chat, engine: Engine, folder: Path):
    chat.add([folder / "one.png"])
    first = said(chat, "what color?")
    chat.add([folder / "with blanks.png"])
    second = said(chat, "yes?")
    text = f"<image>Question: what color? Answer: {first}<|endofchunk|><image>Question: yes? Answer:"
    assert chat.turns[-1].prompt.text == text
    assert second == engine.answer(Prompt(text, (picture(1), picture(2))), SAMPLING).text


def test_styles_write_the_same_turns_otherwise(engine: Engine):
    turns = [Message("user", "<image>a"), Message("assistant", "b"), Message("user", "c ")]
    plain = "<image>a b<|endofchunk|>c "
    assert written(turns, "plain", engine.processor) == plain
    assert written(turns, "template", engine.processor) == "<image>a b<|endofchunk|>c"
    brought = [Message("user", "<image>Question: a Answer:")]
    assert written(brought, "few-shot", engine.processor) == "<image>Question: a Answer:"


def test_undo_and_new(chat: Chat, folder: Path):
    chat.add([folder / "one.png"])
    first = said(chat, "what color?")
    assert chat.undo() and not chat.turns and len(chat.waiting) == 1
    assert said(chat, "what color?") == first and not chat.waiting
    chat.clear()
    assert chat.undo() is None and not chat.waiting


def test_the_oldest_turns_are_left_out_when_they_no_longer_fit(chat: Chat, folder: Path, monkeypatch):
    chat.add([folder / "one.png"])
    said(chat, "what color?")
    need = chat.engine.length(chat._prompt("yes?", (), 0)[0]) + SAMPLING.max_new_tokens
    monkeypatch.setattr(Engine, "room", property(lambda self: need - 1))
    said(chat, "yes?")
    assert chat.forgotten == 1 and chat.turns[-1].prompt.text == "Question: yes? Answer:"
    assert not chat.turns[-1].seen
    with pytest.raises(ValueError, match="shorten the prompt"):
        list(chat.ask("a b " * 100))
    assert len(chat.turns) == 2


def test_an_answer_that_is_ended_stays_as_far_as_it_was_said(chat: Chat):
    stream = chat.ask("what color?")
    first = next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert chat.turns[-1].answer == first and len(first.ids) == 1


def test_commands(chat: Chat, folder: Path, tmp_path: Path, capsys):
    terminal = Terminal(chat, interactive=True)
    for line in (f"/image {folder / 'with blanks.png'}", "/images", "what color?", "/look", "/set", ""):
        terminal.take(line)
    shown = capsys.readouterr().out
    assert "waits: " in shown and "┌────┐" in shown and "temperature=0.0" in shown
    terminal.take(f"/look {tmp_path / 'looks.png'}")
    with Image.open(tmp_path / "looks.png") as drawn:
        assert drawn.width == 64 and drawn.height % 80 == 0
    terminal.take("/set temperature=0.7 seed=1")
    assert chat.sampling == Sampling(max_new_tokens=4, temperature=0.7, seed=1)
    terminal.take("//new is a question too")
    assert chat.turns[-1].question == "/new is a question too"
    with pytest.raises(EOFError):
        terminal.take("/quit")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/imgae a.png", "did you mean '/image'"),
        ("/image nowhere.png", "picture nowhere.png cannot be read"),
        ("/image 'open", "No closing quotation"),
        ("/set temprature=1", "did you mean 'temperature'"),
        ("/set temperature", "write name=value"),
        ("/set top_k=many", "top_k='many'"),
        ("/look", "nothing was answered yet"),
        ("<image> what?", "stands for a picture"),
    ],
)
def test_bad_lines_are_told_and_change_nothing(chat: Chat, line: str, told: str):
    with pytest.raises(ValueError, match=told):
        Terminal(chat, interactive=True).take(line)
    assert not chat.turns and not chat.waiting and chat.sampling == SAMPLING


def test_paths_are_read_as_people_write_them(folder: Path, monkeypatch):
    monkeypatch.chdir(folder)
    assert paths("with blanks.png") == [Path("with blanks.png")]
    assert paths(r"with\ blanks.png one.png") == [Path("with blanks.png"), Path("one.png")]


def test_a_pipe_gets_one_line_per_answer_and_the_first_mistake_ends_it(folder: Path):
    arguments = ["chat", str(folder / "model"), "--max-new-tokens", "4", "--image", str(folder / "one.png")]
    lines = f"what color?\n/image {folder / 'with blanks.png'}\nyes?\n"
    done = CliRunner().invoke(app, arguments, input=lines)
    assert done.exit_code == 0 and len(done.stdout.split("\n")) == 3
    failed = CliRunner().invoke(app, arguments, input=f"/image {folder / 'bad.png'}\nwhat?\n")
    assert failed.exit_code == 1 and not failed.stdout and "error: line 1: picture" in failed.stderr


def test_ctrl_c_ends_the_answer_and_ctrl_d_the_chat(folder: Path, tmp_path: Path):
    terminal, theirs = pty.openpty()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb", "XDG_STATE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "flamingo.cli", "chat", str(folder / "model")]
    # Most answers of this model end by themselves within a second; the one of this seed has 694 tokens.
    command += ["--max-new-tokens", "1900", "--set", "temperature=3", "--set", "seed=0"]
    hears = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # tests in a shell's background ignore it
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env, preexec_fn=hears)
    os.close(theirs)
    try:
        _until(terminal, b"> ")
        os.write(terminal, b"what color?\n")
        _until(terminal, b"what color?\r\n")
        assert select.select([terminal], [], [], 60)[0]  # the answer has begun
        process.send_signal(signal.SIGINT)
        _until(terminal, b"(ended)\r\n> ")  # it reads again: what comes earlier may be lost
        os.write(terminal, b"/set max_new_tokens=3\n")
        _until(terminal, b"num_beams=1 seed=0\r\n> ")
        os.write(terminal, b"\x04")
        assert process.wait(30) == 0
        assert "what color?" in (tmp_path / "flamingo" / "chat_history").read_text()
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


def _until(terminal: int, wanted: bytes) -> None:
    """Reads what the chat writes until `wanted` came."""
    seen, end = b"", time.monotonic() + 60
    while wanted not in seen:
        assert time.monotonic() < end and select.select([terminal], [], [], 60)[0], seen
        seen += os.read(terminal, 65536)

"""Walks a page of the documentation: every block of code, in order, in one folder, as a reader would.

What a block is, its language says:

    bash     one command a line. `flamingo` runs in this process, `flamingo train` and all else in its own;
             `export NAME=VALUE` holds for what follows.
    python   is run, all of a page in one namespace; with a first line `# lab/birds.py` it is that file.
    yaml     with a first line `# mine.yaml` is that file.
    text     what the reader sees of the block before: each line must have been said, whatever its numbers.

Any other language is an error: no block of a page is left out.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
NAMED = re.compile(r"# (?P<name>[\w./-]+\.(?:py|yaml))\n")
NUMBER = re.compile(r"(?:(?<=[\s(])[-+])?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?: [kMB]\b)?")
SECONDS = 240


@dataclass(frozen=True)
class Block:
    """line: where it begins in its page, from 1 on."""

    language: str
    code: str
    line: int


def blocks(text: str) -> list[Block]:
    """All fenced blocks of a page, in order."""
    return [Block(m[1], m[2], text[: m.start()].count("\n") + 1) for m in FENCED.finditer(text)]


def commands(code: str) -> list[str]:
    """The commands of a bash block; those that go on behind a backslash in one piece."""
    return [line.strip() for line in code.replace("\\\n", " ").splitlines() if line.strip()]


def said(line: str, output: str) -> bool:
    """Whether a line of the page stands in an output; numbers may be others, `...` may be anything."""
    parts = []
    for part in re.split(r"(\.\.\.)", line.strip()):
        pieces = [re.sub(r"(?:\\\s)+", r"\\s+", re.escape(p)) for p in NUMBER.split(part)]
        parts.append(".*" if part == "..." else NUMBER.pattern.join(pieces))
    return re.search("".join(parts), output) is not None


@dataclass
class Walk:
    """A page, walked in a folder.

    Attributes:
        instead: texts of the page and what stands in their place: names of large things, numbers of steps.
        answers: lines of its outputs that only the trained model says.
    """

    page: Path
    folder: Path
    monkeypatch: pytest.MonkeyPatch
    instead: Mapping[str, str] = field(default_factory=dict)
    answers: Collection[str] = ()
    names: dict[str, Any] = field(default_factory=dict)
    output: str = ""

    def run(self) -> None:
        """Fails, naming the line of the page, where a block fails or says something else."""
        text = self.page.read_text()
        stale = [part for part in (*self.instead, *self.answers) if part not in text]
        assert not stale, f"{self.page.name} does not hold {stale}"
        self.monkeypatch.chdir(self.folder)
        self.monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        before = set(sys.modules)
        try:
            for block in blocks(text):
                self._block(block)
        finally:
            for name in set(sys.modules) - before:  # another page may have a module of the same name
                if str(getattr(sys.modules[name], "__file__", None)).startswith(str(self.folder)):
                    del sys.modules[name]

    def _block(self, block: Block) -> None:
        where = f"{self.page.name}, line {block.line}"
        code = block.code
        for part, other in self.instead.items():
            code = code.replace(part, other)
        named = NAMED.match(code)
        if block.language == "text":
            lines = [line for line in code.splitlines() if line.strip() and line not in self.answers]
            missing = [line for line in lines if not said(line, self.output)]
            assert not missing, f"{where}: was not said: {missing}\nbut:\n{self.output}"
        elif named and block.language in ("python", "yaml"):
            path = self.folder / named["name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(code)
        elif block.language == "python":
            self._python(code, where)
        elif block.language == "bash":
            self.output = "".join(self._command(line, where) for line in commands(code))
        else:
            raise AssertionError(f"{where}: a block of {block.language or 'no language'} is not run")

    def _python(self, code: str, where: str) -> None:
        with contextlib.redirect_stdout(io.StringIO()) as written:
            try:
                exec(compile(code, where, "exec"), self.names)  # noqa: S102 - our own documentation
            except Exception as error:
                raise AssertionError(f"{where}: {error!r}") from error
        self.output = written.getvalue()

    def _command(self, line: str, where: str) -> str:
        words = shlex.split(line)
        if words[0] == "export":
            name, _, value = words[1].partition("=")
            self.monkeypatch.setenv(name, value)
            if name == "PYTHONPATH":
                self.monkeypatch.syspath_prepend(str((self.folder / value).resolve()))
            return ""
        if words[0].endswith("flamingo") and words[1] != "train":
            from flamingo.cli import app

            result = CliRunner().invoke(app, words[1:])
            crash = isinstance(result.exception, Exception) and not isinstance(result.exception, SystemExit)
            shown = f"{result.output}{result.exception!r}" if crash else result.output
            status = result.exit_code
        else:
            run = ["bash", "-euc", line]
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(run, env=env, capture_output=True, text=True, timeout=SECONDS)
            shown, status = done.stdout + done.stderr, done.returncode
        assert status == 0, f"{where}: `{line}` ended with status {status}:\n{shown}"
        return shown

"""Every snippet of the README runs, on the world in miniature."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def commands() -> list[list[str]]:
    joined = "\n".join(snippets("bash")).replace("\\\n", " ")
    return [shlex.split(line) for line in joined.splitlines() if line.strip()]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.new("RGB", (80, 60), "red").save(path)
    return path


def test_the_readme_has_the_two_commands_and_both_languages():
    assert ["make", "quickstart"] in commands() and ["make", "test"] in commands()
    assert len(snippets("python")) == 1


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_shell_snippets_run(command: list[str], trained: Path, picture: Path, cli):
    if command[0] == "make":  # what they call is run by the other tests
        done = subprocess.run(["make", "-n", *command[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return
    assert command[0] == ".venv/bin/flamingo"
    places = {"PICTURE": str(picture), "runs/quickstart/model": str(trained / "model")}
    done = cli(*[places.get(word, word) for word in command[1:]])
    assert done.returncode == 0, done.stderr


def test_the_python_snippet_runs(trained: Path, picture: Path):
    code = snippets("python")[0].replace("runs/quickstart/model", str(trained / "model"))
    code = code.replace('"PICTURE"', repr(str(picture)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_commands_named_in_the_readme_exist(cli):
    named = set(re.findall(r"`flamingo (\w+)", (ROOT / "README.md").read_text()))
    text = cli("--help").stdout
    assert named and all(name in text for name in named)

"""The commands and files of docs/asking.md run as they stand."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flamingo.cli import app
from flamingo.serving.settings import NAMES
from flamingo.serving.styles import STYLES
from flamingo.serving.terminal import HELP
from tests.eval.harness_model import picture, write_model

TEXT = (Path(__file__).parents[2] / "docs" / "asking.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.S)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model")
    picture(1).save("one.png")
    picture(2).save("two.png")
    Path("prompts.jsonl").write_text(blocks("json")[0])
    return tmp_path


def test_the_commands_run(folder: Path):
    for line in filter(None, "\n".join(blocks("bash")).splitlines()):
        before, _, after = line.rpartition(" | ")
        program, *arguments = shlex.split(after)
        assert program == "flamingo"
        lines = shlex.split(before)[1].replace("\\n", "\n") if before else None
        done = CliRunner().invoke(app, arguments, input=lines)
        assert done.exit_code == 0, f"{line}: {done.output}"
        assert done.stdout.strip()
    records = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [record["id"] for record in records] == ["a", 2, "c"]
    told = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| `id`.*?\n\n", TEXT, re.M | re.S))))
    assert set(records[0]) <= told


def test_the_conversation_runs(folder: Path):
    (talk,) = blocks("text")
    lines = "".join(line[2:] + "\n" for line in talk.splitlines())
    done = CliRunner().invoke(app, ["chat", "model", "--max-new-tokens", "3"], input=lines)
    assert done.exit_code == 0 and "share of its look" in done.stdout


def test_styles_settings_and_commands_that_it_names_exist():
    assert re.findall(r"^\| `([a-z-]+)` \| .* \| .* \|$", TEXT, re.M)[:3] == list(STYLES)
    assert {name for name in NAMES if f"`{name}`" in TEXT} == set(NAMES)
    assert all(name in HELP for name in re.findall(r"`(/\w+)", TEXT))

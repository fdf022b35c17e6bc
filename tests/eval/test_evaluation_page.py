"""docs/evaluation.md names commands, options and settings that there are, with their defaults."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
import typer
import yaml

from flamingo.cli import app
from flamingo.eval.commands import run
from flamingo.eval.config import SHOTS, EvalConfig
from flamingo.train.config import EvaluateConfig

PAGE = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()


def commands() -> list[list[str]]:
    lines = "\n".join(re.findall(r"```\n(.*?)```", PAGE, re.S)).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_of_the_page_is_understood(words):
    if words[0] in ("torchrun", "deepspeed"):  # flamingo.eval takes the words of `flamingo eval run`
        words = ["flamingo", "eval", "run", *words[words.index("flamingo.eval") + 1 :]]
    command: click.Command = typer.main.get_command(app)
    names = words[1:]
    while isinstance(command, click.Group):
        command = command.commands[names.pop(0)]
    command.make_parser(click.Context(command)).parse_args(list(names))  # raises for what it does not know


def test_the_defaults_of_the_page_are_those_of_the_command():
    defaults = EvalConfig(benchmark="easy_vqa")
    assert f"| `--shots N` (several times) | {', '.join(map(str, SHOTS))} |" in PAGE
    for option, value in (
        ("shots-from", f"`{defaults.shots_from}`"),
        ("zero-shot", f"`{defaults.zero_shot}`"),
        ("pool", f"{defaults.pool:,}"),
        ("trials", defaults.trials),
        ("beams", defaults.beams),
        ("ensemble", defaults.ensemble),
    ):
        assert f"| `--{option}` | {value} |" in PAGE, option
    assert f"`--control-limit`, {defaults.control_limit:,} queries" in PAGE


def test_every_setting_is_an_option_with_the_same_default():
    import inspect

    options = inspect.signature(run).parameters
    for name, field in EvalConfig.model_fields.items():
        assert name in options, name
        if options[name].default is not None and options[name].default is not inspect.Parameter.empty:
            assert options[name].default == field.default, name


def test_the_recipe_section_of_the_page_is_one():
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    section = EvaluateConfig(**yaml.safe_load(text)["evaluate"])
    assert EvalConfig(**section.settings).shots == (0, 4)

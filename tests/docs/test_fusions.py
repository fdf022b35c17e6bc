"""What docs/fusions.md says of sizes, commands and settings is so."""

from __future__ import annotations

import re

import pytest

from flamingo.connectors import connectors
from flamingo.fusions import fusions
from flamingo.quickstart import RECIPE
from flamingo.train.config import read_recipe
from flamingo.train.planning.assembly import assemble, parameters
from tests.docs.test_pages import ROOT, code, commands, misfit
from tests.train.backbones import known_backbones

PAGE = ROOT / "docs" / "fusions.md"
TEXT = PAGE.read_text()


def sizes() -> list[list[str]]:
    """Rows of the table of the quickstart's sizes: connector, fusion, trained parameters, tokens."""
    part = TEXT[TEXT.index("With the quickstart's two backbones") :]
    lines = re.findall(r"^\| `.*$", part[: part.index("## Which one")], re.M)[1:]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("row", sizes(), ids=lambda row: "-".join(row[:2]))
def test_sizes_are_those_of_the_models(row: list[str], monkeypatch: pytest.MonkeyPatch):
    known_backbones(monkeypatch)
    connector, fusion, trained, tokens = row
    own = [f"model.architecture.connector={connector}", f"model.architecture.fusion={fusion}"]
    model = assemble(read_recipe(RECIPE, ["model.vision=timm:tf_efficientnet_lite0", *own]))
    assert sum(parameters(model)[1].values()) == int(trained.replace(",", ""))
    assert model.image_tokens == int(tokens)


def test_all_connectors_and_fusions_are_there():
    assert len(sizes()) == 6
    for name in (*connectors(), *fusions()):
        assert f"| `{name}`" in TEXT, name


def test_commands_recipes_and_settings_exist():
    wrong = {" ".join(words): said for words in commands(PAGE) if (said := misfit(words))}
    assert not wrong
    for path in re.findall(r"train/recipes/[\w.-]+\.yaml", TEXT):
        assert (ROOT / path).is_file(), path
    assert "make compare" in code(TEXT) and re.search(r"^compare:", (ROOT / "Makefile").read_text(), re.M)


def test_options_of_the_comparison_exist():
    compare = pytest.importorskip("benchmarks.compare", reason="the benchmarks lie beside the package")
    (line,) = re.findall(r"^python -m benchmarks.compare (.*)$", TEXT, re.M)
    given = compare.arguments(line.split())
    assert given.only == ["perceiver", "mlp"] and given.steps == 200
    for override in re.findall(r"`--set ([^`]+)`", TEXT):
        if override != "key=value":
            assert compare.ways(compare.arguments(["--set", override]))

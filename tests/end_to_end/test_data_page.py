"""The commands and snippets of docs/data.md run as they stand."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from flamingo.cli import app
from flamingo.data.config import SourceConfig
from flamingo.data.kinds import kind_names, load_kind
from flamingo.data.kinds._members import example_png as png
from flamingo.folders import assemble

TEXT = (Path(__file__).parents[2] / "docs" / "data.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.S)


@pytest.fixture
def folder(tmp_path: Path, world: Path, monkeypatch) -> Path:
    """What the page says that the reader has."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "downloaded").mkdir()
    for number in range(6):
        (tmp_path / "photos" / f"{number}.png").write_bytes(png((40 * number, 0, 0)))
        (tmp_path / "photos" / f"{number}.txt").write_text(f"picture {number}")
    (tmp_path / "downloaded" / "a.png").write_bytes(png())
    image = {"image_name": "a.png", "matched_text_index": 0, "matched_sim": 0.3}
    page = {"text_list": ["words"], "image_info": [image], "similarity_matrix": [[0.3]]}
    (tmp_path / "docs_shard_0.jsonl").write_text(json.dumps(page) + "\n")
    (tmp_path / "obelics.jsonl").write_text(json.dumps({"texts": [None, "x"], "images": ["a.png", None]}))
    fields = ["cross_attention_every=1", "resampler_depth=1"]
    assemble(tmp_path / "model", f"timm:{world / 'vision'}", str(world / "language"), fields, "float32")
    return tmp_path


def test_the_commands_and_the_python_run(folder: Path, capsys):
    for line in filter(None, "\n".join(blocks("bash")).splitlines()):
        program, *arguments = shlex.split(line)
        assert program == "flamingo"
        result = CliRunner().invoke(app, [*arguments, *(["--workers", "1"] if "show" not in line else [])])
        assert result.exit_code == 0, f"{line}: {result.output}"
    for written in ("documents.html", "stats/stats.png", "mmc4/dataset.json", "features/features.json"):
        assert (folder / written).stat().st_size
    for code in blocks("python"):
        exec(code, {})  # noqa: S102 - our own documentation
    assert "Text(text='picture" in capsys.readouterr().out


def test_the_recipes_are_ones_and_the_table_of_kinds_is_complete():
    for text in blocks("yaml"):
        for source in yaml.safe_load(text)["sources"]:
            SourceConfig.model_validate(source)
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| (.*?)\|$", TEXT, re.M))
    assert sorted(rows) == kind_names()
    for name, told in rows.items():
        options = getattr(load_kind(name), "Options", None)
        # `between` only matters to whoever changes the prompt.
        known = set(options.model_fields) - {"between"} if options else set()
        assert set(re.findall(r"`(\w+)`", told)) == known

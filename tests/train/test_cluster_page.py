"""What docs/cluster.md says of statuses, files, templates and options is what the code has."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

from flamingo.train import lock, stopping, watchdog
from flamingo.train.__main__ import parse
from flamingo.train.config import Recipe

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "cluster.md").read_text()


def commands() -> list[list[str]]:
    blocks = "".join(re.findall(r"```bash\n(.*?)```", PAGE, re.S)).replace("\\\n", " ")
    return [shlex.split(line) for line in blocks.splitlines() if line]


def test_the_statuses_and_files_are_those_of_the_code():
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", PAGE, re.M)
    words = {int(status): text for status, text in rows}
    assert "hung" in words[watchdog.STATUS] and "asked to stop" in words[stopping.STATUS]
    for name in (stopping.ASK, stopping.ANSWER, lock.NAME):
        assert f"RUN/{name}" in PAGE
    assert f"({Recipe.model_fields['watchdog_seconds'].default:,.0f})" in PAGE
    for name in ("wall_minutes", "checkpoint_every"):
        assert name in Recipe.model_fields and name in PAGE


def test_every_template_is_in_the_table_and_the_other_way_round():
    told = set(re.findall(r"^\| `(\S+\.sh)` \|", PAGE, re.M))
    assert told == {path.name for path in (ROOT / "train" / "templates").glob("*.sh")}


def test_the_entry_understands_what_the_launchers_hand_it():
    entries = [line[line.index("flamingo.train") + 1 :] for line in commands() if "flamingo.train" in line]
    assert len(entries) == 3
    for arguments in entries:
        understood = parse(["--local_rank=1", *arguments])
        assert understood.recipe == "RECIPE.yaml" and understood.overrides == ["run=/shared/runs/mine"]


def test_the_templates_are_found_where_the_page_says(tmp_path):
    import flamingo.train

    (line,) = (" ".join(line) for line in commands() if line[0] == "cp")
    assert "flamingo.train.__path__[0]" in line
    folder = Path(flamingo.train.__path__[0]) / "templates"
    subprocess.run(f"cp {shlex.quote(str(folder))}/*.sh .", shell=True, check=True, cwd=tmp_path)
    assert (tmp_path / "slurm.sh").exists()

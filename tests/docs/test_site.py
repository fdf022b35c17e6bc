"""The documentation site: no page is left out, no link leads nowhere, drawings are those of today's code."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from docs.drawings import sight
from docs.drawings.__main__ import FOLDER, drawings
from flamingo.data.config import Augment
from flamingo.train.config import Recipe

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(p for p in DOCS.rglob("*.md") if "_build" not in p.parts)
LINKED = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
FENCED = re.compile(r"^(```+|:::+).*?^\1\s*$", re.M | re.S)


def extension(name: str) -> Iterator[ModuleType]:
    """A module of docs/_ext, as Sphinx imports it."""
    sys.path.insert(0, str(DOCS / "_ext"))
    yield importlib.import_module(name)
    sys.path.remove(str(DOCS / "_ext"))


@pytest.fixture(scope="module")
def generated() -> Iterator[ModuleType]:
    yield from extension("generated")


@pytest.fixture(scope="module")
def docstrings() -> Iterator[ModuleType]:
    yield from extension("docstrings")


# ---- pages and links ---------------------------------------------------------------------------


def contents(text: str) -> list[str]:
    """The pages of all tables of contents of a page, in order."""
    trees = re.findall(r"^```\{toctree\}\n(.*?)^```", text, re.M | re.S)
    lines = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
    return [re.sub(r".*<(.+)>$", r"\1", line) for line in lines]


def test_every_page_is_in_the_contents_once():
    named = contents((DOCS / "index.md").read_text())
    there = {page.relative_to(DOCS).with_suffix("").as_posix() for page in PAGES} - {"index"}
    assert sorted(named) == sorted(there)


def anchors(page: Path) -> set[str]:
    """What `#...` may lead to: headings as GitHub and MyST name them, and ids in HTML."""
    text = FENCED.sub("", page.read_text())
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.+?)\s*$", text, re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain.replace("`", "")).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {slug if not n else f"{slug}-{n}" for slug, last in found.items() for n in range(last + 1)} | set(
        re.findall(r'\bid="([\w-]+)"', text)
    )


def broken(page: Path) -> list[str]:
    """Links inside the repository that lead to no file, or to no heading of it."""
    text = re.sub(r"`[^`\n]*`", "", FENCED.sub("", page.read_text()))
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text):
        if re.match(r"\w+:", target):
            continue
        place, _, heading = target.partition("#")
        path = page.parent / place if place else page
        missing = not path.exists()
        if missing or (heading and path.suffix == ".md" and heading not in anchors(path)):
            found.append(target)
    return found


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(page: Path):
    assert broken(page) == []


def test_links_that_lead_nowhere_are_seen(tmp_path: Path):
    (tmp_path / "there.md").write_text("# One `two`, three!\n\n## Again\n\n## Again\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Here\n[a](there.md) [b](there.md#one-two-three) [c](#here) [d](https://a.b/c)\n"
        "[e](there.md#again-1) `[f](code.md)`\n\n```text\n[g](block.md)\n```\n\n"
        '[h](gone.md) [i](there.md#four) <img src="gone.png">\n'
    )
    assert broken(page) == ["gone.md", "there.md#four", "gone.png"]


def test_contents_are_read():
    assert contents("```{toctree}\n:hidden:\n\na\nB <b/c>\n```\n\n```text\nd\n```\n") == ["a", "b/c"]


# ---- drawings ----------------------------------------------------------------------------------


def test_drawings_are_those_of_the_code():
    """Otherwise: python -m docs.drawings, and look at them."""
    made = drawings()
    assert {path.name for path in FOLDER.iterdir()} == made.keys()
    assert [name for name, svg in made.items() if (FOLDER / name).read_text(encoding="utf-8") != svg] == []


def test_drawings_show_what_each_word_sees():
    words = f"a {sight.IMAGE} b {sight.IMAGE} c".split()
    assert sight.seen_by(words) == [[], [0], [0], [1], [1]]
    assert sight.seen_by(words, "previous") == [[], [0], [0], [0, 1], [0, 1]]
    assert sight.seen_by(words, "previous", [0, 0, 0, 1, 1]) == [[], [0], [0], [1], [1]]
    assert sight.seen_by(words, ahead=True) == [[0], [0], [1], [1], []]


# ---- what pages show of the code ------------------------------------------------------------------


def test_every_setting_of_a_recipe_is_shown_with_type_default_and_meaning(generated: ModuleType):
    rows = generated.settings("flamingo.train.config.Recipe").splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(Recipe.model_fields)
    zero = next(row for row in rows if "`zero_stage`" in row)
    assert r"`0 \| 1 \| 2 \| 3`" in zero and "| `0` |" in zero and "What ranks share out" in zero
    augment = generated.settings("flamingo.data.config.Augment")
    assert "| `flip` | `float` (≥ 0, ≤ 1) | `0.0` | Share of pictures that are mirrored. |" in augment
    assert len(augment.splitlines()) == 2 + len(Augment.model_fields)


def test_meanings_are_found_in_docstrings_too(generated: ModuleType):
    text = "Attributes:\n    a: the first,\n        and more; b, c: the others.\n    d: None: nothing."
    assert generated.attributes(text) == {
        "a": "the first, and more", "b": "the others.", "c": "the others.", "d": "None: nothing.",
    }  # fmt: skip


def test_every_command_is_shown(generated: ModuleType):
    import typer.main

    from flamingo.cli import app

    def leaves(command, path: str) -> list[str]:
        inside = getattr(command, "commands", None)
        if inside is None:
            return [path]
        return [leaf for name in inside for leaf in leaves(inside[name], f"{path} {name}")]

    shown = generated.commands()
    commands = leaves(typer.main.get_command(app), "flamingo")
    assert len(commands) > 15 and [name for name in commands if f"# `{name}`\n" not in shown] == []
    assert "`--max-new-tokens" in shown and "\\<image\\>" in shown


def test_what_help_says_is_no_markup_but_code_is(generated: ModuleType):
    assert generated.plain("<image> a_b*, `c_d*` [x]") == r"\<image\> a\_b\*, `c_d*` \[x\]"


def test_docstrings_are_taken_as_plain_text(docstrings: ModuleType):
    lines = ["Takes `x`, *_norm and |y|.", "", "Raises:", "    ValueError: no x", "        or no y."]
    lines.append("    OSError: z.")
    assert docstrings.restructured(lines) == [
        r"Takes ``x``\ , \*\_norm and \|y\|.", "",
        "**Raises**", "", "- ValueError: no x or no y.", "- OSError: z.", "",
    ]  # fmt: skip


def test_parameters_of_a_docstring_become_a_list(docstrings: ModuleType):
    lines = ["A sum. a: the first; b, c:", "others, e.g. x: 1.", "Returns it."]
    made = docstrings.restructured(lines, {"a", "b", "c"})
    assert made[:-2] == [
        "A sum.", "", "- a: the first", "- b, c: others, e.g. x: 1.", "", "Returns it.", "",
    ]  # fmt: skip
    assert docstrings.restructured(lines) == ["A sum. a: the first; b, c: others, e.g. x: 1. Returns it.", ""]


def test_links_out_of_the_documentation_lead_to_pages_of_the_site(generated: ModuleType):
    page = DOCS / "tutorials" / "few-shot.md"
    text = "[a](../../README.md) [b](../../flamingo/media.py) [c](../../train/recipes) [d](../data.md#kinds)"
    made = '[a](../index.md) <a href="../source/flamingo/media.py.html">b</a> c [d](../data.md#kinds)'
    assert generated.linked(text, page, ROOT) == made


# ---- the whole -------------------------------------------------------------------------------------


def test_the_site_builds_without_warnings_and_without_a_network(tmp_path: Path):
    """As `make docs` does; every page is there, drawings stand in theirs, links go to pages of the site."""
    (command,) = re.findall(r"python -m (sphinx .*) docs docs/_build/html", (ROOT / "Makefile").read_text())
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "http_proxy": "http://127.0.0.1:9",
    }
    env |= {"https_proxy": env["http_proxy"], "HF_HUB_OFFLINE": "1"}
    out = tmp_path / "html"
    done = subprocess.run(
        [sys.executable, "-m", *command.split(), "docs", str(out)],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr, done.stderr
    built = {page.relative_to(out).with_suffix(".md") for page in out.rglob("*.html")}
    assert {page.relative_to(DOCS) for page in PAGES} <= built
    concepts = (out / "concepts.html").read_text()
    assert concepts.count("<svg xmlns='http://www.w3.org/2000/svg' class='drawing'") == len(drawings())
    assert 'href="../concepts.html' in (out / "api" / "model.html").read_text()
    assert (out / "source" / "flamingo" / "media.py.html").is_file()
    fetched = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?:)?//', concepts)
    assert fetched == []

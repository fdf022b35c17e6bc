"""What the guides and the README name is there: commands, options, recipe keys, modules, files.

The pages tell of other projects too; what is said of OpenFlamingo's options is held to its package.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import re
import shlex
import subprocess
import sys
import tarfile
import types
import typing
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from pydantic import BaseModel

from flamingo.cli import app
from flamingo.config import FlamingoConfig
from flamingo.data import kinds
from flamingo.data.document import Text
from flamingo.data.errors import BadSample
from flamingo.data.shards import ShardSet
from flamingo.train.config import Recipe

ROOT = Path(__file__).parents[2]
GUIDES = ("cluster", "comparison", "migration", "performance", "reading-a-run")
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in GUIDES)]
FREE = {"deepspeed", "vision_options", "settings"}  # sections that take what others define
each_page = pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])


FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def code(text: str) -> list[str]:
    """Inline code of a page, its blocks apart."""
    return re.findall(r"`([^`\n]+)`", FENCED.sub("", text))


def blocks(text: str, *languages: str) -> list[str]:
    return [found for language, found in FENCED.findall(text) if language in languages]


def lines(text: str) -> list[str]:
    """Lines of all shell blocks, continued ones joined, without comments."""
    joined = "\n".join(blocks(text, "bash", "text", "")).replace("\\\n", " ")
    return [re.sub(r"\s+#.*", "", line).strip() for line in joined.splitlines()]


def rows(text: str, heading: str) -> list[list[str]]:
    """Cells of the first table below a heading, its head left out."""
    part = text[text.index(f"\n{heading}\n") :]
    table = re.search(r"(?:^\|.*\n)+", part, re.M)
    assert table
    return [[cell.strip() for cell in line.strip("|").split(" |")] for line in table[0].splitlines()[2:]]


# ---- commands ----------------------------------------------------------------------------------


def commands(page: Path) -> list[list[str]]:
    """Words of every command of ours that a page writes."""
    text = page.read_text()
    written = [*code(text), *lines(text)]
    ours = [re.sub(r"^\S*\.venv/bin/", "", line) for line in written]
    return [shlex.split(line)[1:] for line in ours if re.match(r"flamingo [a-z]", line)]


def misfit(words: list[str]) -> str | None:
    """What of a command is not there, or None."""
    command: Any = typer.main.get_command(app)  # of typer's own copy of click in newer versions
    rest = list(words)
    while rest and rest[0] in getattr(command, "commands", {}):
        command = command.commands[rest.pop(0)]
    if hasattr(command, "commands"):
        return f"no command {rest[0]}" if rest and re.match("[a-z]", rest[0]) else None
    known = {"--help"} | {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
    return next((f"no option {w}" for w in rest if w.startswith("--") and w.split("=")[0] not in known), None)


@each_page
def test_every_command_and_its_options_exist(page: Path):
    wrong = {" ".join(words): said for words in commands(page) if (said := misfit(words))}
    assert not wrong


def test_commands_that_are_not_there_are_found():
    assert misfit(["eval", "rum"]) == "no command rum" and misfit(["frob"]) == "no command frob"
    assert misfit(["eval", "run", "MODEL", "--shot", "4"]) == "no option --shot"
    assert misfit(["eval", "run", "MODEL", "--shots", "4"]) is None and misfit(["eval"]) is None


@each_page
def test_modules_that_are_run_exist(page: Path):
    for module in re.findall(r"python -m ((?:flamingo|benchmarks)[\w.]*)", page.read_text()):
        assert importlib.util.find_spec(module), module


@each_page
def test_targets_of_make_exist(page: Path):
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.M))
    text = page.read_text()
    named = [line.split()[1] for line in [*code(text), *lines(text)] if re.match(r"make [a-z]", line)]
    assert set(named) <= targets


# ---- recipe keys -------------------------------------------------------------------------------


def sections(annotation: Any) -> list[type[BaseModel]]:
    """Models inside a field's type: of a list, of something or None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (list, typing.Union, types.UnionType):
        return [model for part in typing.get_args(annotation) for model in sections(part)]
    return []


def options() -> set[str]:
    """Options of all shard kinds."""
    loaded = [kinds.load_kind(name) for name in kinds.kind_names()]
    return {name for kind in loaded if hasattr(kind, "Options") for name in kind.Options.model_fields}


def is_key(key: str) -> bool:
    """Whether a recipe may hold `a.b.c`; of sources the name is left out."""
    known: type[BaseModel] = Recipe
    parts = key.split(".")
    while parts:
        part = parts.pop(0)
        if part not in known.model_fields:
            return False
        if part in FREE or not parts:
            return True
        if part == "architecture":
            return parts[0] in FlamingoConfig.__annotations__
        if part == "options":
            return parts[0] in options()
        if part == "sources":
            parts.pop(0)
            if not parts:
                return True
        inner = sections(known.model_fields[part].annotation)
        if not inner:
            return part == "lr_factors"
        known = inner[0]
    return True


@each_page
def test_dotted_recipe_keys_exist(page: Path):
    first = "|".join(Recipe.model_fields)
    words = [re.split("[=: ]", word)[0] for word in code(page.read_text())]
    named = [word for word in words if re.fullmatch(rf"({first})(\.\w+)+", word)]
    keys = [word for word in named if not re.search(r"\.(json|yaml|md|py)$", word)]  # files
    methods = [word for word in keys if word.startswith("model.") and word.count(".") == 1]
    assert not [key for key in keys if key not in methods and not is_key(key)]
    for key in methods:
        from flamingo import FlamingoForConditionalGeneration

        assert is_key(key) or hasattr(FlamingoForConditionalGeneration, key[6:]), key


def test_keys_that_are_not_there_are_found():
    assert is_key("sources.NAME.options.min_similarity") and is_key("optimizer.lr_factors.gates")
    assert is_key("model.architecture.gate_init") and is_key("lora.rank")
    for key in ("sources.NAME.optins", "optimizer.lr_factor", "model.architecture.gate", "clip"):
        assert not is_key(key)


@each_page
def test_yaml_blocks_hold_recipe_keys(page: Path):
    from flamingo.data.config import SourceConfig

    for block in blocks(page.read_text(), "yaml"):
        fields = yaml.safe_load(block)
        of_source = set(fields) <= set(SourceConfig.model_fields)
        assert of_source or set(fields) <= set(Recipe.model_fields), block
        for source in [fields] if of_source else fields.get("sources", []):
            for name in source.get("options", {}):
                assert name in options()


# ---- OpenFlamingo's options --------------------------------------------------------------------

MIGRATION = (ROOT / "docs" / "migration.md").read_text()
OF_MODEL = {  # of the file of its evaluation that its wheel leaves out
    *("--lm_path", "--lm_tokenizer_path", "--checkpoint_path", "--cross_attn_every_n_layers", "--device"),
    *("--vision_encoder_path", "--vision_encoder_pretrained", "--precision"),
}


def their_options(path: str) -> set[str]:
    found = importlib.util.find_spec("open_flamingo")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs OpenFlamingo's package, which `make test` installs")
    source = (Path(found.submodule_search_locations[0]) / path).read_text()
    return set(re.findall(r"add_argument\(\s*\"(--[\w-]+)\"", source))


def flags(cell: str) -> set[str]:
    return {word for word in code(cell) if word.startswith("--")}


def test_the_table_of_training_has_every_option_and_our_keys():
    table = rows(MIGRATION, "## Training")
    theirs = [flag for row in table for flag in flags(row[0])]
    assert len(theirs) == len(set(theirs)) and set(theirs) == their_options("train/train.py")
    ours = [key for row in table for key in code(row[1])]
    assert ours and not [key for key in ours if not is_key(key)]


def test_the_table_of_evaluation_has_every_option_and_ours():
    table = rows(MIGRATION, "## Evaluation")
    told = {flag for row in table for flag in flags(row[0])}
    theirs = their_options("eval/evaluate.py")
    paths = {flag for flag in theirs if flag.endswith("_path")}
    assert theirs - paths <= told and told - theirs <= OF_MODEL | {"--..._path"}
    words = [["eval", "run", word] for row in table for word in code(row[1])]
    assert words and not [said for each in words if (said := misfit(each))]


def test_names_of_benchmarks_are_ours():
    from flamingo.eval import benchmarks

    (row,) = [row for row in rows(MIGRATION, "## Evaluation") if "`--eval_coco`" in row[0]]
    assert len(code(row[2])) == len(flags(row[0])) and set(code(row[2])) <= set(benchmarks.names())


# ---- what the page of migration shows ----------------------------------------------------------


def test_its_python_runs(tmp_path: Path):
    from PIL import Image

    from tests.end_to_end.conftest import language_folder, vision_folder

    (snippet,) = blocks(MIGRATION, "python")
    places = {"open_clip:ViT-L-14/openai": f"timm:{vision_folder(tmp_path / 'vision')}"}
    places |= {"mosaicml/mpt-7b": str(language_folder(tmp_path / "language"))}
    places |= {"cross_attention_every=4": "cross_attention_every=2", "offset=3": "offset=1"}
    for there, here in places.items():
        assert there in snippet
        snippet = snippet.replace(there, here)
    picture = Image.new("RGB", (64, 64), "red")
    space = {"picture": picture, "other": picture}
    exec(snippet, space)  # noqa: S102 - the page's own
    assert space["model"].config.block_positions == [1]  # type: ignore[attr-defined]
    assert space["output"].shape[0] == 1  # type: ignore[attr-defined]


def their_page(whole: bool) -> bytes:
    """A page as OpenFlamingo's script writes it: pictures in base64, none where it was not downloaded."""
    from flamingo.data.kinds._members import example_png

    there = {"image_base64": base64.b64encode(example_png()).decode()}
    first = {"image_name": "a.png", "matched_text_index": 0, "matched_sim": 0.3}
    second = {"image_name": "b.png", "matched_text_index": 1, "matched_sim": 0.3}
    infos = [first | there, second | (there if whole else {})]
    page = {"text_list": ["One.", "Two."], "image_info": infos}
    return json.dumps(page | {"similarity_matrix": [[0.1, 0.3], [0.3, 0.1]]}).encode()


def test_their_mmc4_shards_are_read_and_written_anew_as_the_page_says(tmp_path: Path):
    (block,) = blocks(MIGRATION, "yaml")
    read = kinds.reader("mmc4", yaml.safe_load(block)["options"])
    whole = read({"json": their_page(True)}, "0")
    texts = [item.text if isinstance(item, Text) else "picture" for item in whole.items]
    assert texts == ["picture", "One.", "picture", "Two."]
    with pytest.raises(BadSample, match=r"b\.png"):
        read({"json": their_page(False)}, "0")
    with tarfile.open(tmp_path / "000000000.tar", "w") as shard:
        for number in range(2):
            member = tarfile.TarInfo(f"{number}.json")
            member.size = len(their_page(False))
            shard.addfile(member, io.BytesIO(their_page(False)))
    (unpack, convert) = [line for line in lines(MIGRATION) if "pages.jsonl" in line]
    subprocess.run(unpack, shell=True, check=True, cwd=tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "flamingo.cli", *shlex.split(convert)[1:]],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shards = ShardSet([str(tmp_path / "mmc4" / "*.tar")])
    documents = [read(shards.read(0, number), str(number)) for number in range(2)]
    assert [sum(not isinstance(item, Text) for item in d.items) for d in documents] == [1, 1]


# ---- figures and settings of the other pages ---------------------------------------------------


def test_published_figures_are_those_that_reports_draw():
    from flamingo.eval.results.published import FIGURES

    table = rows((ROOT / "docs" / "comparison.md").read_text(), "## Published figures")
    told = {row[0]: [tuple(map(float, cell.split(", "))) for cell in row[1:]] for row in table}
    assert told == {name: [FIGURES[b][name] for b in FIGURES] for name in FIGURES["coco"]}


def test_what_was_measured_is_said_alike_on_both_pages():
    pages = [(ROOT / "docs" / f"{name}.md").read_text() for name in ("comparison", "performance")]
    table = rows(pages[0], "## Measured here against OpenFlamingo")[:5]
    figures = {figure for row in table for figure in re.findall(r"\d+\.\d+|\d{2}", row[1])}
    assert len(figures) > 8 and not [figure for figure in figures if figure not in pages[1]]


def test_what_the_performance_guide_turns_is_there():
    page = (ROOT / "docs" / "performance.md").read_text()
    keys = [re.split("[=:]", key)[0] for row in rows(page, TURNS) for key in code(row[1])]
    assert len(keys) > 9 and not [key for key in keys if not is_key(key)]
    words = [[*["eval", "run", "MODEL"], *w.split()] for r in rows(page, ASKS) for w in code(r[0])]
    assert len(words) > 6 and not [said for each in words if (said := misfit(each))]


TURNS, ASKS = "## Training: what to turn, in this order", "## Evaluation: what to turn"


# ---- links and length --------------------------------------------------------------------------


@each_page
def test_links_inside_the_repository_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", page.read_text()):
        place = next(filter(None, target)).partition("#")[0]
        if place and not re.match(r"\w+://", place):
            assert (page.parent / place).exists(), place


def test_the_readme_fits_on_two_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100


def test_the_picture_of_the_readme_is_small():
    (place,) = re.findall(r"docs/images/[\w-]+\.png", (ROOT / "README.md").read_text())
    assert (ROOT / place).stat().st_size < 150_000

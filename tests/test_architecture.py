"""The import rules of the house, held by reading the sources: nothing is imported here.

Modules have the names that they are imported by: train/loop.py is flamingo.train.loop.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {"flamingo": "flamingo", "train": "flamingo.train", "eval": "flamingo.eval"}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 75
# The loop of training is read on one screen, a step of it at one glance.
OWN_LIMITS = {"flamingo.train.loop": 100, "flamingo.train.loop.train_step": 50}

# A module may import those before its own line, in `flamingo.`; `vision` stands for its files.
LAYERS = [
    {"config", "layers", "nll", "runtime", "chat", "attention_products", "written", "names"},
    {"media", "attention_blocks", "expansion"},
    {"attention_graph"},
    {"vision", "resampler", "cross_attention", "attention"},
    {"cache", "connectors"},
    {"decoder", "generation"},
    {"freezing", "fusions"},
    {"modeling"},
    {"processing"},
    {"factory", "registration"},
    {"checkpoints"},
]
BELOW = {name: set().union(*LAYERS[:level]) for level, names in enumerate(LAYERS) for name in names}
BELOW["vision"] = {"config"}
FOLDERS = ("vision", "connectors", "fusions", "checkpoints")  # whose files may import each other
# What the model may use of the data room.
FROM_DATA = {
    "processing": {"flamingo.data.transforms"},
    "written": {"flamingo.data.writing"},
    "checkpoints": {"flamingo.data.writing"},
}

# Who may import a heavy or optional library; others get at it through them.
OWNERS = {
    "deepspeed": {"flamingo.train.engine", "flamingo.train.moments"},
    "open_clip": {
        "flamingo.vision.open_clip",
        "flamingo.eval.embedding",
        "flamingo.train.contrastive.encoder",
        "flamingo.train.contrastive.loss",
    },
    "timm": {"flamingo.vision.timm", "flamingo.backbones"},
    "faiss": {"flamingo.eval.retrieval.search"},
    "pymilvus": {"flamingo.eval.retrieval.milvus"},
    "milvus_lite": {"flamingo.eval.retrieval.milvus"},
    "gradio": {"flamingo.serving.demo.page"},
}


parse = cache(ast.parse)  # each test asks of the whole house


@cache
def sources() -> Mapping[str, str]:
    """Module -> source, of everything that is installed."""
    found = {}
    for folder, package in ROOMS.items():
        for path, _, files in os.walk(ROOT / folder):  # does not follow the two symlinks
            for file in filter(lambda name: name.endswith(".py"), files):
                inside = (Path(path) / file).relative_to(ROOT / folder).with_suffix("")
                parts = [part for part in inside.parts if part != "__init__"]
                found[".".join([package, *parts])] = (Path(path) / file).read_text()
    return MappingProxyType(found)


def imports(module: str, source: str, known: Iterable[str] = ()) -> Iterator[str]:
    """Every module that `module` imports, at the top or within functions.

    `from package import name` is an import of package.name where `known` says that is a module.
    """
    known = set(known)
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                near = module.split(".")[: -node.level]
                base = ".".join([*near, base]).strip(".")
            inner = [f"{base}.{alias.name}" for alias in node.names]
            yield from (name if name in known else base for name in inner)
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func)
            name = node.args[0]
            if called.endswith(("import_module", "__import__")) and isinstance(name, ast.Constant):
                yield str(name.value)


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def violations(modules: Mapping[str, str]) -> list[str]:
    """Imports that a rule forbids, as 'importer imports imported: rule'."""
    found = []
    for module, source in modules.items():
        for imported in sorted(set(imports(module, source, modules))):
            for rule in broken_rules(module, imported):
                found.append(f"{module} imports {imported}: {rule}")
    return found


def broken_rules(module: str, imported: str) -> Iterator[str]:
    library = imported.split(".")[0]
    if module not in OWNERS.get(library, {module}):
        yield f"only {', '.join(sorted(OWNERS[library]))} may"
    if not is_in(imported, "flamingo"):
        return
    layer, other = (name.split(".")[1] if "." in name else "" for name in (module, imported))
    may = imported in FROM_DATA.get(layer, {"flamingo"}) or layer == other in FOLDERS
    if layer in BELOW and other not in BELOW[layer] and not may:
        yield f"{layer} may import of flamingo only {', '.join(sorted(BELOW[layer])) or 'none'}"
    if layer == "data" and other in BELOW and other != "runtime":
        yield "data never imports the model"
    if layer == "data" and other in ("train", "eval"):
        yield "data knows neither training nor evaluation"
    if other == "serving" and layer not in ("serving", "cli"):
        yield "only the command line knows serving"
    if layer == "serving" and other in ("train", "eval"):
        yield "serving knows neither training nor evaluation"
    if layer == "eval" and other == "train":
        yield "train and eval never import each other"
    if layer == "train" and other == "eval" and module != "flamingo.train.__main__":
        yield "train and eval never import each other"


def cycle(modules: Mapping[str, str]) -> list[str]:
    """One import cycle as a path that ends where it begins; empty if there is none."""
    graph = {
        module: sorted({name for name in imports(module, source, modules) if name in modules})
        for module, source in modules.items()
    }
    done: set[str] = set()

    def search(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module not in done:
            for imported in graph[module]:
                if found := search(imported, [*path, module]):
                    return found
            done.add(module)
        return []

    return next((found for module in graph if (found := search(module, []))), [])


def too_long(modules: Mapping[str, str]) -> list[str]:
    found = []
    for module, source in modules.items():
        if (lines := len(source.splitlines())) > OWN_LIMITS.get(module, MAX_FILE_LINES):
            found.append(f"{module}: {lines} lines")
        for node in ast.walk(parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or 0) - node.lineno + 1
                name = f"{module}.{node.name}"
                if lines > OWN_LIMITS.get(name, MAX_FUNCTION_LINES):
                    found.append(f"{name}: {lines} lines")
    return found


# -- the house ---------------------------------------------------------------------------


def test_the_rules_see_every_room():
    modules = sources()
    expected = "config decoder modeling factory processing vision vision.timm data.batch train.loop"
    assert {f"flamingo.{name}" for name in expected.split()} <= modules.keys()
    on_disk = sum(len(list((ROOT / room).rglob("*.py"))) for room in ("train", "eval"))
    assert sum(is_in(m, f"flamingo.{r}") for m in modules for r in ("train", "eval")) == on_disk


def test_imports_go_one_way():
    assert violations(sources()) == []


def test_no_imports_go_in_a_circle():
    assert cycle(sources()) == []


def test_no_file_and_no_function_is_too_long_to_read():
    assert too_long(sources()) == []
    step = "def train_step():\n" + "    pass\n" * 50
    assert too_long({"flamingo.train.loop": step}) == ["flamingo.train.loop.train_step: 51 lines"]


def test_training_and_evaluation_have_one_name_only():
    """They are imported through the package, by symlinks that are part of it."""
    for room in ("train", "eval"):
        link = ROOT / "flamingo" / room
        assert link.is_symlink() and os.readlink(link) == f"../{room}"
        assert "raise ImportError" in (ROOT / room / "__init__.py").read_text()
    assert not (ROOT / "tests" / "flamingo" / "__init__.py").exists()


# -- the rules themselves: each sees a violation -------------------------------------------


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("flamingo.config", "from flamingo.media import Runs"),
        ("flamingo.layers", "import flamingo.media"),
        ("flamingo.layers", "from flamingo import config"),
        ("flamingo.resampler", "from flamingo.cross_attention import Media"),
        ("flamingo.cross_attention", "def f():\n    from flamingo.decoder import Decoder"),
        ("flamingo.decoder", "from .modeling import FlamingoForConditionalGeneration"),
        ("flamingo.modeling", "from flamingo.data.batch import Batch"),
        ("flamingo.modeling", "from flamingo.data import transforms"),
        ("flamingo.processing", "from flamingo.data.batch import Batch"),
        ("flamingo.vision.timm", "from flamingo.layers import attend"),
        ("flamingo.factory", "from flamingo.train.config import Recipe"),
        ("flamingo.factory", "from flamingo.checkpoints import openflamingo"),
        ("flamingo.modeling", "from flamingo.checkpoints.tensors import read_checkpoint"),
        ("flamingo.checkpoints.openflamingo", "import open_clip"),
        ("flamingo.checkpoints.idefics", "from flamingo.train.session import export"),
        ("flamingo.data.batch", "from flamingo.config import ADDED_TOKENS"),
        ("flamingo.data.kinds.pairs", "from ...modeling import FlamingoOutput"),
        ("flamingo.data.steps", "import flamingo.train.config"),
        ("flamingo.train.loop", "from flamingo.eval.run import evaluate"),
        ("flamingo.eval.run", "from flamingo import train"),
        ("flamingo.train.launch", "import deepspeed"),
        ("flamingo.train.loop", "from deepspeed.runtime import engine"),
        ("flamingo.modeling", "import open_clip"),
        ("flamingo.factory", "def f():\n    import timm.data"),
        ("flamingo.vision.open_clip", "import timm"),
        ("flamingo.eval.few_shot", "import faiss"),
        ("flamingo.cli", "import importlib\nimportlib.import_module('deepspeed')"),
    ],
)
def test_an_import_against_the_rules_is_seen(module, source):
    everything = {**sources(), module: source}
    (found,) = [line for line in violations(everything) if line.startswith(f"{module} ")]
    assert ": " in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("flamingo.decoder", "from flamingo.media import Runs\nimport torch"),
        ("flamingo.modeling", "from flamingo import vision"),
        ("flamingo.vision", "from flamingo.config import FlamingoVisionConfig"),
        ("flamingo.processing", "from flamingo.data.transforms import ImageTransform"),
        ("flamingo.train.engine", "def f():\n    import deepspeed"),
        ("flamingo.train.launch", "import subprocess\nsubprocess.run(['-m', 'deepspeed'])"),
        ("flamingo.train.__main__", "from flamingo.eval.run import evaluate"),
        ("flamingo.eval.run", "from flamingo.factory import create"),
        ("flamingo.checkpoints.idefics", "from flamingo.checkpoints.tensors import save"),
    ],
)
def test_an_import_within_the_rules_is_let_through(module, source):
    assert violations({**sources(), module: source}) == violations(sources())


def test_a_circle_is_seen_and_shown():
    modules = {
        "flamingo.a": "from flamingo import b",
        "flamingo.b": "def f():\n    from flamingo.c import x",
        "flamingo.c": "from .a import y",
        "flamingo.d": "import flamingo.a",
    }
    assert cycle(modules) == ["flamingo.a", "flamingo.b", "flamingo.c", "flamingo.a"]
    assert cycle({**modules, "flamingo.c": ""}) == []


def test_what_is_too_long_is_seen():
    function = "def f():\n" + "    pass\n" * MAX_FUNCTION_LINES
    modules = {"flamingo.long": "\n" * (MAX_FILE_LINES + 1), "flamingo.f": function}
    assert too_long(modules) == ["flamingo.long: 401 lines", "flamingo.f.f: 76 lines"]
    assert too_long({"flamingo.f": function.replace("    pass\n", "", 1)}) == []

"""What pages show of the code itself, put in where they say so in a comment of their own line:

    <!-- commands -->                         the command line, every command with its options
    <!-- settings flamingo.data.config.Augment -->  the fields of a model of settings, as a table
    <!-- contract flamingo.data.kinds -->     the docstring of a module, as it stands

Links out of docs/ lead to the page of the site that holds the file, or to one made of the file itself.
"""

from __future__ import annotations

import importlib
import inspect
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Union

MARK = re.compile(r"^<!-- (commands|settings|contract)(?: ([\w.]+))? -->$", re.M)
LINK = re.compile(r"\[(?P<text>[^\]\n]+)\]\((?P<up>(?:\.\./)*)(?P<path>[\w./-]+?)/?(?P<anchor>#[\w-]+)?\)")
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}


# ---- settings ------------------------------------------------------------------------------------


def type_name(kind: Any) -> str:
    """A type as it would be written, without the package's module paths."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return type_name(inside[0])
    if origin is typing.Literal:
        return " | ".join(map(repr, inside))
    if origin in (Union, UnionType):
        return " | ".join(map(type_name, inside))
    if origin is not None:
        named = ["..." if part is Ellipsis else type_name(part) for part in inside]
        return f"{origin.__name__}[{', '.join(named)}]"
    return "None" if kind is type(None) else getattr(kind, "__name__", str(kind))


def _default(field: Any) -> str:
    if field.is_required():
        return "*required*"
    if field.default_factory is None:
        return f"`{field.default!r}`"
    made = field.default_factory()
    return f"`{made!r}`" if isinstance(made, (list, dict)) else f"`{type(made).__name__}()`"


def _limits(field: Any) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = [f"{signs[n]} {getattr(m, n)}" for m in field.metadata for n in signs if hasattr(m, n)]
    return f" ({', '.join(found)})" if found else ""


def settings(name: str) -> str:
    """The fields of a pydantic model, or of a model's configuration: name, type, default, meaning."""
    module, _, cls = name.rpartition(".")
    model = getattr(importlib.import_module(module), cls)
    if not hasattr(model, "model_fields"):
        rows = [(key, str(kind), f"`{getattr(model, key)!r}`") for key, kind in own_fields(model).items()]
        return table("field", "type", "default", rows=[(f"`{key}`", f"`{kind}`", d) for key, kind, d in rows])
    meanings = attributes(inspect.getdoc(model) or "")
    rows = []
    for key, field in model.model_fields.items():
        meaning = field.description or meanings.get(key) or _what(field.annotation)
        if re.match(r"[a-z]+\b(?![._])", meaning):
            meaning = meaning[:1].upper() + meaning[1:]
        kind = f"`{type_name(field.annotation)}`{_limits(field)}"
        rows.append((f"`{key}`", kind, _default(field), plain(meaning)))
    return table("setting", "type", "default", "meaning", rows=rows)


def own_fields(model: type) -> dict[str, str]:
    """name -> type of the fields that a class adds to what it is made from."""
    return {key: kind for key, kind in model.__dict__["__annotations__"].items() if key in vars(model)}


def table(*head: str, rows: list[tuple[str, ...]]) -> str:
    lines = [" | ".join(head), "|".join(["---"] * len(head))]
    lines += [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def _what(kind: Any) -> str:
    """The first sentence about a section that is a field of another."""
    inside = [kind, *typing.get_args(kind)]
    docs = [inspect.getdoc(k) for k in inside if isinstance(k, type) and k.__module__.startswith("flamingo.")]
    return re.sub(r"\s+", " ", (docs[0] or "")).partition(". ")[0] if docs else ""


def attributes(text: str) -> dict[str, str]:
    """name -> meaning, of the `name: meaning; name, name: meaning.` in a docstring."""
    joined = re.sub(r"\s+", " ", text.partition("Attributes:")[2]).strip()
    pieces = re.split(r"(?:^|(?<=[;.]) )((?:[a-z_]+, )*[a-z_]+): ", joined)
    found = {}
    for names, meaning in zip(pieces[1::2], pieces[2::2], strict=True):
        found |= dict.fromkeys(names.split(", "), meaning.strip().rstrip(";"))
    return found


# ---- commands ------------------------------------------------------------------------------------


def commands() -> str:
    """The command line, from the same objects that `--help` reads."""
    import typer.main

    from flamingo.cli import app

    return "\n".join(_command(typer.main.get_command(app), "flamingo", 2))


def _command(command: Any, path: str, level: int) -> Iterator[str]:
    context = command.make_context(path.split()[-1], [], resilient_parsing=True)
    group = getattr(command, "commands", None)
    if path != "flamingo":
        yield from [f"{'#' * level} `{path}`", ""]
    yield from [plain(command.help or ""), ""]
    if group is None:
        yield from _usage(command, context, path)
        return
    for name in group:
        yield from _command(group[name], f"{path} {name}", level + (path != "flamingo"))


def _usage(command: Any, context: Any, path: str) -> Iterator[str]:
    pieces = " ".join(command.collect_usage_pieces(context))
    yield from ["```text", f"{path} {pieces}", "```", ""]
    rows = [record for p in command.params if (record := p.get_help_record(context))]
    if rows:
        yield from ["| | |", "|---|---|"]
        for names, meaning in rows:
            cells = (f"`{names}`".replace("|", "\\|"), plain(meaning).replace("|", "\\|"))
            yield f"| {cells[0]} | {cells[1]} |"
        yield ""


def plain(text: str) -> str:
    """Help as Markdown: what it holds of <, * and the like is no markup, but `code` is code."""
    parts = re.split(r"(`[^`\n]+`)", re.sub(r"[\b\f]", "", inspect.cleandoc(text)))
    return "".join(p if p.startswith("`") else re.sub(r"([<>*_\[\]])", r"\\\1", p) for p in parts)


# ---- pages ---------------------------------------------------------------------------------------


def contract(name: str) -> str:
    text = inspect.getdoc(importlib.import_module(name)) or ""
    first, _, rest = text.partition("\n")
    return f"{first}\n\n```text\n{inspect.cleandoc(rest)}\n```"


def filled(text: str) -> str:
    """A page with its marks replaced."""

    def made(found: re.Match[str]) -> str:
        what, name = found.groups()
        return commands() if what == "commands" else {"settings": settings, "contract": contract}[what](name)

    return MARK.sub(made, text)


def linked(text: str, page: Path, root: Path) -> str:
    """A page whose links to files beyond docs/ lead to pages of the site; a folder is named only."""

    def target(found: re.Match[str]) -> str:
        path = (page.parent / found["up"] / found["path"]).resolve()
        inside = path.relative_to(root).as_posix() if path.is_relative_to(root) else ""
        up = "../" * (len(page.relative_to(root / "docs").parts) - 1)
        if inside in PAGES:
            return f"[{found['text']}]({up}{PAGES[inside]}{found['anchor'] or ''})"
        if path.is_dir():
            return found["text"]
        if path.is_file() and not path.is_relative_to(root / "docs"):
            return f'<a href="{up}source/{inside}.html">{found["text"]}</a>'
        return found[0]

    return LINK.sub(target, text)


def files_linked(page: Path, root: Path) -> set[str]:
    """The files beyond docs/ that a page links to, as paths in the repository."""
    return set(re.findall(r'<a href="(?:\.\./)*source/([^"]+)\.html">', linked(page.read_text(), page, root)))


def _sources(app: Any) -> Iterator[tuple[str, dict[str, Any], str]]:
    """A page of each file of code that pages link to."""
    docs = Path(app.srcdir)
    pages = [docs / f"{name}.md" for name in app.env.found_docs]
    for name in sorted(set().union(*(files_linked(page, docs.parent) for page in pages))):
        language = {".py": "python", ".yaml": "yaml", ".sh": "bash"}.get(Path(name).suffix, "none")
        code = (docs.parent / name).read_text(encoding="utf-8")
        body = app.builder.highlighter.highlight_block(code, language, linenos="inline")
        yield f"source/{name}", {"title": name, "body": f"<h1>{name}</h1>\n{body}"}, "page.html"


def _read(app: Any, docname: str, source: list[str]) -> None:
    page = Path(app.srcdir) / f"{docname}.md"
    source[0] = linked(filled(source[0]), page, Path(app.srcdir).parent)


def setup(app: Any) -> dict[str, Any]:
    app.connect("source-read", _read)
    app.connect("html-collect-pages", _sources)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

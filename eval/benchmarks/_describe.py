"""What `flamingo eval describe` says: which benchmarks there are, what one needs, what a folder lacks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from flamingo.eval import benchmarks, hub
from flamingo.eval.benchmarks import Example, File
from flamingo.processing import END_OF_CHUNK, IMAGE

NAMED = 5  # missing pictures that are named
# The fields of a prompt, where there is no data to show one from.
PLACES = Example("1", Path("picture.jpg"), "{question}", ("{answer}",), context="{text}")


def describe(name: str | None, data: Path | None = None) -> tuple[str, bool]:
    """(text, whether nothing that an evaluation needs is missing).

    Without a name, a table of all benchmarks; with data, the folder's files are checked, and the splits
    are read: of the hub's copy ("hub"), fetched. Raises ValueError for an unknown name, for data without
    a name, and for a folder that is not there.
    """
    if name is None:
        if data is not None:
            raise ValueError(f"data={data}: say of which benchmark, e.g. flamingo eval describe coco --data")
        return _table(), True
    benchmark = benchmarks.load(name)
    if data is None:
        return _description(name, benchmark), True
    if not hub.asked(data) and not data.is_dir():
        raise ValueError(f"data={data} is not a folder")
    return _checked(benchmark, data)


def _table() -> str:
    rows = [("name", "title", "task", "metrics", "splits (asked*, shots+)")]
    for name in benchmarks.names():
        each = benchmarks.load(name)
        task = "generates" if each.MAX_NEW_TOKENS else "ranks classes"
        rows.append((name, each.TITLE, task, ", ".join(each.METRICS), _splits(each)))
    return "\n".join(
        [*_columns(rows), "", "flamingo eval describe NAME: its files, from where; --data FOLDER checks."]
    )


def _splits(benchmark: ModuleType) -> str:
    marks = {benchmark.QUERIES: "*", benchmark.DEMONSTRATIONS: "+"}
    if benchmark.QUERIES == benchmark.DEMONSTRATIONS:
        marks = {benchmark.QUERIES: "*+"}
    return " ".join(split + marks.get(split, "") for split in benchmark.FILES)


def _columns(rows: Sequence[Sequence[str]], indent: str = "") -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _description(name: str, benchmark: ModuleType) -> str:
    first, *others = benchmark.METRICS
    blind = "not measured" if benchmark.BLIND is None else f"{benchmark.BLIND:.3f}"
    answer = f"generated, at most {benchmark.MAX_NEW_TOKENS} tokens" if benchmark.MAX_NEW_TOKENS else "ranked"
    copy: hub.Copy | None = getattr(benchmark, "HUB", None)
    facts = [
        ("", benchmark.DESCRIPTION),
        ("score", first + (f"; also {', '.join(others)}" if others else "")),
        ("without looking", blind),
        ("answers", answer),
        ("licence", benchmark.LICENCE),
        ("source", benchmark.SOURCE),
        ("splits", f"{_splits(benchmark)}   (* is asked, + gives shots)"),
        ("on the hub", f"{copy.address} (--data hub): {' '.join(copy.splits)}" if copy else "no copy known"),
    ]
    lines = [
        f"{benchmark.TITLE} ({name})",
        *_columns(facts, "  "),
        "",
        "Files, in one folder (--data FOLDER)",
    ]
    lines += _columns(_file_rows(benchmark), "  ") or ["  none: it comes with its package"]
    lines += [
        "",
        "Prompt: a shot, and a query",
        f"  {_shot(benchmark, PLACES)}",
        f"  {_query(benchmark, PLACES)}",
    ]
    return "\n".join(lines)


def _files(benchmark: ModuleType) -> dict[File, list[str]]:
    """Each file -> the splits that need it."""
    found: dict[File, list[str]] = {}
    for split, files in benchmark.FILES.items():
        for file in files:
            found.setdefault(file, []).append(split)
    return found


def _file_rows(benchmark: ModuleType) -> list[tuple[str, ...]]:
    return [
        (file.path + ("/" if file.images else ""), " ".join(splits), file.where)
        for file, splits in _files(benchmark).items()
    ]


def _query(benchmark: ModuleType, example: Example) -> str:
    return f"{IMAGE}{benchmark.prompt(example)}".replace("\n", "\\n")


def _shot(benchmark: ModuleType, example: Example) -> str:
    return _query(benchmark, example) + f"{benchmark.completion(example)}{END_OF_CHUNK}".replace("\n", "\\n")


def _checked(benchmark: ModuleType, data: Path) -> tuple[str, bool]:
    """Files that are there, then each split as an evaluation would read it."""
    lines, needed = [f"{benchmark.TITLE}, {data}"], {benchmark.QUERIES, benchmark.DEMONSTRATIONS}
    if not hub.asked(data):
        lines += _columns([_there(file, data) for file in _files(benchmark)], "  ")
    rows, complete, shown = [], True, ""
    for split in benchmark.FILES:
        said, whole, example = _split(benchmark, data, split)
        rows.append((split + (" (needed)" if split in needed else ""), said))
        complete &= whole or split not in needed
        if example and split in needed:
            shown = _shot(benchmark, example) if example.answers else _query(benchmark, example)
    lines += _columns(rows, "  ")
    if shown:
        lines += [f"  an example: {shown}"]
    verdict = "complete" if complete else f"not complete: {' and '.join(sorted(needed))} must be"
    return "\n".join([*lines, verdict]), complete


def _there(file: File, data: Path) -> tuple[str, str]:
    path = data / file.path
    return file.path + ("/" if file.images else ""), "there" if path.exists() else "not there"


def _split(benchmark: ModuleType, data: Path, split: str) -> tuple[str, bool, Example | None]:
    """(what is said of a split, whether it is whole, its first example)."""
    try:
        found = benchmark.examples(data, split)
    except ValueError as error:
        return str(error), False, None
    if not found:
        return "no example in the files", False, None
    images = dict.fromkeys(e.image for e in found)
    missing = [image for image in images if not image.exists()]
    twice = [name for name, count in Counter(e.id for e in found).items() if count > 1]
    said = f"{len(found):,} examples, {len(images):,} pictures"
    said += f", {len(missing):,} of them missing" if missing else ""
    if missing:
        names = ", ".join(str(image) for image in missing[:NAMED])
        said += f": {names}{' ...' if len(missing) > NAMED else ''}"
    if twice:
        said += f"; {len(twice):,} ids come more than once, the first is {twice[0]!r}"
    return said, not missing and not twice, found[0]

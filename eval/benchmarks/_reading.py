"""Official files, read with errors that say which file is wrong and where it comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flamingo.eval import hub
from flamingo.eval.benchmarks import File


def find(folder: Path | None, file: File, title: str) -> Path:
    """A file or folder of the data folder. Raises ValueError where it is not there."""
    if folder is None:
        raise ValueError(f"{title} needs its data: --data FOLDER, with {file.path} from {file.where}")
    if hub.asked(folder):
        raise ValueError(
            f"data={folder}: {title} has no copy on the hub that this knows; give a folder with the "
            f"official files, {file.path} from {file.where}"
        )
    path = folder / file.path
    if not path.exists():
        raise ValueError(f"{title}: {path} is not there; it comes from {file.where}, or set data")
    return path


def read_json(path: Path) -> Any:
    """Raises ValueError for what is no JSON, with the place."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): fetch it again") from None


def read_json_lines(path: Path) -> list[Any]:
    """One value per line, empty lines left out. Raises ValueError, naming the line."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}, is no JSON ({error}): fetch it again") from None
    return found


def malformed(path: Path, number: int, error: Exception) -> ValueError:
    """Of an entry that lacks a field, or has another type there."""
    return ValueError(
        f"{path}, entry {number}, is not in the published format ({type(error).__name__}: {error}): "
        "fetch it again"
    )

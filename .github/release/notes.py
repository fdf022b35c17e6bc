"""Prints the section of CHANGELOG.md for a tag: `python .github/release/notes.py v1.2.3`.

Fails where the tag is not the version of the package, or the changelog has no words for it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def notes(changelog: str, version: str) -> str:
    """The body of `## [version]`. Raises ValueError where there is none, or an empty one."""
    heading = re.compile(rf"^## \[{re.escape(version)}\].*$", re.MULTILINE)
    found = heading.search(changelog)
    if found is None:
        raise ValueError(f"CHANGELOG.md has no section '## [{version}]': name it after the version")
    body = re.split(r"^(?:## |\[[^\]]+\]: )", changelog[found.end() :], maxsplit=1, flags=re.MULTILINE)[0]
    if not body.strip():
        raise ValueError(f"the section '## [{version}]' of CHANGELOG.md is empty: say what is new")
    return body.strip() + "\n"


def version_of(source: str) -> str:
    """What flamingo/__init__.py says, without importing it. Raises ValueError where it says nothing."""
    found = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if found is None:
        raise ValueError('flamingo/__init__.py has no __version__ = "..."')
    return found[1]


def main(tag: str) -> str:
    """The notes of a tag. Raises ValueError."""
    version = version_of((ROOT / "flamingo" / "__init__.py").read_text())
    if tag != f"v{version}":
        raise ValueError(f"tag {tag!r}, but flamingo/__init__.py says {version!r}: tag it 'v{version}'")
    return notes((ROOT / "CHANGELOG.md").read_text(), version)


if __name__ == "__main__":
    try:
        sys.stdout.write(main(sys.argv[1]))
    except ValueError as error:
        sys.exit(str(error))

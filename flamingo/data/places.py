"""Where shards lie: paths, globs, ranges and addresses of stores -> a list without repetition."""

from __future__ import annotations

import glob
import os
import posixpath
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from braceexpand import braceexpand

# What may be opened. Nothing here starts a program, as pipe: does elsewhere.
SCHEMES = ("https", "s3", "gs", "hf", "http")
LISTING = ("s3", "gs", "hf")  # stores that can be asked what they hold
LOOPBACK = ("localhost", "127.0.0.1", "::1")

Place = Path | str  # a local file, or an address
Lister = Callable[[str], list[str]]


def expand(patterns: str | Path | Sequence[str | Path]) -> list[Path]:
    """Paths, globs and ranges -> existing local tar files, in the order given (globs sorted).

    Raises:
        ValueError: nothing given, nothing found, a file given twice, or an address.
    """
    places = expand_all(patterns)
    if remote := [place for place in places if isinstance(place, str)]:
        raise ValueError(f"{remote[0]!r} is not a local file: this needs shards on disk, copy them first")
    return [Path(place) for place in places]


def expand_all(
    patterns: str | Path | Sequence[str | Path], allow_http: bool = False, listed: Lister | None = None
) -> list[Place]:
    """As `expand`, and addresses of stores too.

    allow_http: unencrypted addresses of other machines; listed(glob): what a store holds.

    Raises:
        ValueError: as `expand`; or an address of a kind that is not allowed.
    """
    given = [patterns] if isinstance(patterns, (str, Path)) else list(patterns)
    if not any(given):
        raise ValueError("`shards` is empty: name at least one tar, as in data/pairs-{000..003}.tar")
    places = [place for pattern in given for place in _expand_one(pattern, allow_http, listed)]
    seen: set[str] = set()
    for place in places:
        real = place if isinstance(place, str) else os.path.realpath(place)
        if real in seen:
            raise ValueError(f"`shards` names {place} twice: its samples would count double")
        seen.add(real)
    return places


def names_of(places: Sequence[Place]) -> list[str]:
    """Names from the common folder of all: a copy of the shards elsewhere has the same names."""
    full = [place if isinstance(place, str) else os.path.abspath(place) for place in places]
    if all(isinstance(place, str) for place in places):
        if len({urlsplit(address)[:2] for address in full}) > 1:
            return full
        paths = [urlsplit(address).path for address in full]
        common = posixpath.commonpath([posixpath.dirname(path) or "/" for path in paths])
        return [posixpath.relpath(path, common) for path in paths]
    if any(isinstance(place, str) for place in places):
        return full
    common = os.path.commonpath([os.path.dirname(path) for path in full])
    return [os.path.relpath(path, common).replace(os.sep, "/") for path in full]


def check_address(address: str, allow_http: bool = False) -> str:
    """The address, if it may be opened.

    Raises:
        ValueError: another scheme than `SCHEMES`, or plain http to another machine.
    """
    scheme = address.partition(":")[0].lower()
    if scheme not in SCHEMES or "://" not in address:
        allowed = ", ".join(f"{name}://" for name in SCHEMES)
        raise ValueError(f"`shards` names {address!r}: shards are local files, or begin with {allowed}")
    if scheme == "http" and not allow_http and urlsplit(address).hostname not in LOOPBACK:
        raise ValueError(
            f"`shards` names {address!r}: http:// is neither encrypted nor signed; use https://, or set "
            "remote.allow_http=true of the source"
        )
    return address


def _expand_one(pattern: str | Path, allow_http: bool, listed: Lister | None) -> Iterator[Place]:
    if isinstance(pattern, Path):  # not a pattern: the file with this very name
        yield _file(str(pattern), str(pattern))
        return
    remote = re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", pattern) is not None
    try:
        names = list(braceexpand(pattern if remote else os.path.expanduser(pattern)))
    except ValueError as error:
        raise ValueError(f"`shards` names {pattern!r}: {error}") from error
    for name in names:
        yield from _addresses(check_address(name, allow_http), listed) if remote else _files(name, pattern)


def _addresses(name: str, listed: Lister | None) -> list[str]:
    scheme = name.partition(":")[0].lower()
    # In an http address ? begins a query.
    if scheme not in LISTING:
        if "*" in name:
            raise ValueError(
                f"`shards` names {name!r}: {scheme} cannot list files; write a range {{000..099}}"
            )
        return [name]
    if not glob.has_magic(name) or listed is None:
        return [name]
    found = sorted(listed(name))
    if not found:
        raise ValueError(f"`shards` names {name!r}, which matches no file")
    return found


def _files(name: str, pattern: str) -> Iterator[Path]:
    if os.path.isfile(name):
        yield Path(name)
    elif os.path.isdir(name) or not glob.has_magic(name):
        yield _file(name, pattern)
    else:
        found = sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path))
        if not found:
            raise ValueError(f"`shards` names {name!r}, which matches no file")
        yield from map(Path, found)


def _file(name: str, pattern: str) -> Path:
    if os.path.isdir(name):
        raise ValueError(f"`shards` names the folder {name}: write {name.rstrip('/')}/*.tar")
    if not os.path.isfile(name):
        raise ValueError(f"`shards` names {name}, which is not there (from {pattern!r})")
    return Path(name)

"""What strangers may send to the page, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from flamingo.data.errors import BadSample
from flamingo.data.transforms import FORMATS, decode_image
from flamingo.serving.prompt import Sampling


@dataclass(frozen=True)
class Limits:
    """Raises ValueError for one below 1. The prompt's text is counted with its answers, in characters."""

    max_pictures: int = 6
    max_megabytes: int = 20
    max_megapixels: int = 40
    max_characters: int = 4000
    max_new_tokens: int = 256
    max_beams: int = 8

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")

    def check_sampling(self, sampling: Sampling) -> Sampling:
        """The same. Raises ValueError for an answer that would take the machine too long."""
        for name, most in (("max_new_tokens", self.max_new_tokens), ("num_beams", self.max_beams)):
            if (value := getattr(sampling, name)) > most:
                raise ValueError(f"{name}={value}: this page allows at most {most}")
        return sampling

    def check_text(self, text: str) -> None:
        """Raises ValueError for more characters than are allowed."""
        if len(text) > self.max_characters:
            raise ValueError(
                f"the prompt has {len(text)} characters: this page allows {self.max_characters}; shorten it"
            )

    def read_picture(self, path: Path, folder: Path) -> Image:
        """The upright RGB picture of an upload, whose size is read before any pixel is decoded.

        folder: where uploads lie. Raises ValueError for a file that lies elsewhere, is too large, or
        is no picture.
        """
        path, folder = path.resolve(), folder.resolve()
        if not path.is_relative_to(folder):
            raise ValueError("only uploaded pictures are read: choose a file of your own")
        try:
            size = path.stat().st_size
            if size > self.max_megabytes * 1_000_000:
                raise ValueError(
                    f"the file has {size / 1e6:.1f} MB: this page takes pictures of at most "
                    f"{self.max_megabytes} MB; make it smaller"
                )
            return decode_image(path.read_bytes(), self.max_megapixels * 1_000_000)
        except BadSample as error:
            if error.fault == "too large image":
                raise ValueError(
                    f"the picture is too large: this page takes pictures of at most {self.max_megapixels} "
                    "million pixels; make it smaller"
                ) from None
            raise ValueError(
                f"the file is no picture that can be read: choose one of {', '.join(FORMATS)}"
            ) from None
        except OSError:
            raise ValueError("the picture is not here any more: choose it again") from None


def check_files(data: Any, folder: Path) -> None:
    """Raises ValueError where a request names a file that was not uploaded: a path of the server, an
    address, or anything but one file."""
    for given in _paths(data):
        if not isinstance(given, str) or "://" in given or "\0" in given:
            raise ValueError("only uploaded pictures are read: an address is not")
        if not Path(given).resolve().is_relative_to(folder.resolve()):
            raise ValueError("only uploaded pictures are read: a path of the server is not")


def _paths(data: Any) -> Iterator[Any]:
    if isinstance(data, dict):
        if "path" in data:
            yield data["path"]
        for value in data.values():
            yield from _paths(value)
    elif isinstance(data, (list, tuple)):
        for value in data:
            yield from _paths(value)

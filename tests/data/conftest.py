"""Tiny shards and a tiny tokenizer, made in code."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flamingo.data.config import SourceConfig
from flamingo.data.kinds._members import example_png
from flamingo.data.transforms import ImageTransform

WORDS = ["<pad>", "<image>", "<eoc>", "a", "b", "c", "d", "q", "?", "sample"]
WORDS += [str(number) for number in range(100)]

WriteTar = Callable[..., Path]


def make_pair(number: int) -> dict[str, bytes]:
    return {"png": example_png((number, 0, 0)), "txt": f"sample {number}".encode()}


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; <image> and <eoc> are special, as in a real tokenizer."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", additional_special_tokens=["<image>", "<eoc>"]
    )


@pytest.fixture(scope="session")
def transform() -> ImageTransform:
    return ImageTransform(size=4, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@pytest.fixture
def write_tar(tmp_path: Path) -> WriteTar:
    def write(name: str, samples: Mapping[str, Mapping[str, bytes]]) -> Path:
        path = tmp_path / name
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, members in samples.items():
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        return path

    return write


@pytest.fixture
def pair() -> Callable[[int], dict[str, bytes]]:
    """Makes a caption pair that says which one it is, in its text and in its picture."""
    return make_pair


@pytest.fixture
def source(tmp_path: Path, write_tar: WriteTar) -> SourceConfig:
    """24 caption pairs in shards of 5, 6, 7, 0 and 6 samples; windows of 2 shards."""
    first = 0
    for shard, count in enumerate([5, 6, 7, 0, 6]):
        numbers = range(first, first + count)
        write_tar(f"s-{shard}.tar", {f"{number:04d}": make_pair(number) for number in numbers})
        first += count
    shards = str(tmp_path / "s-{0..4}.tar")
    return SourceConfig(name="pairs", kind="pairs", shards=shards, batch=24, max_tokens=16, window=2)

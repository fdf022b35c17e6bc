"""Shards are checked to the last byte, and read at random."""

from __future__ import annotations

import io
import os
import tarfile

import pytest
import webdataset

from flamingo.data import index
from flamingo.data.errors import ShardError
from flamingo.data.index import build_index
from flamingo.data.kinds._members import example_png as png
from flamingo.data.places import expand
from flamingo.data.shards import ShardSet


@pytest.fixture
def shard(write_tar, pair):
    return write_tar("x.tar", {f"{i:04d}": pair(i) for i in range(6)})


def everything(shard_set: ShardSet) -> dict[str, dict[str, bytes]]:
    places = [(s, i) for s, count in enumerate(shard_set.counts) for i in range(count)]
    return {shard_set.key(*place): shard_set.read(*place) for place in places}


def test_samples_are_those_that_webdataset_reads(write_tar, pair):
    members = {"PNG": png(), "0.seg.txt": b"a", "txt": b"", "json": b"{}"}
    path = write_tar("x.tar", {"b.dir/0001": members, "0002": pair(2), "._0002": {"png": b"x"}})
    theirs = {
        sample["__key__"]: {k: v for k, v in sample.items() if not k.startswith("__")}
        for sample in webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)  # pyright: ignore
    }
    assert everything(ShardSet(str(path))) == theirs


def test_every_cut_of_a_tar_is_detected_and_named(shard, tmp_path):
    whole = shard.read_bytes()
    size = max(o + s for _, m in build_index(shard).samples() for o, s in m.values())
    end = -(-size // 512) * 512  # of the last sample, padded
    cut = tmp_path / "cut.tar"
    for length in range(0, end + 512, 128):
        cut.write_bytes(whole[:length])
        with pytest.raises(ShardError, match=r"cut\.tar.*byte \d+") as caught:
            ShardSet(str(cut))
        if length > 2048:
            assert caught.value.key is not None
    cut.write_bytes(whole[: end + 512])  # some writers end with one empty block
    assert len(everything(ShardSet(str(cut)))) == 6


def test_names_and_forms_of_any_tar_fit_their_index(tmp_path):
    names = ["a/" * 60 + "x.png", "фото.1.txt", "y" * 150 + ".PNG", "z.JSON", "b.dir/c.d.e"]
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        path = tmp_path / f"{form}.tar"
        with tarfile.open(path, "w", format=form) as tar:
            for name in names:
                add(tar, name)
        assert len(everything(ShardSet(str(path)))) == len(names)


def test_a_damaged_header_does_not_hide_the_samples_behind_it(shard):
    data = bytearray(shard.read_bytes())
    at = data.find(b"0003.png")
    data[at + 2] = ord("9")
    shard.write_bytes(data)
    with pytest.raises(ShardError, match=f"'0002', byte {at}: damaged header"):
        build_index(shard)


def test_joined_compressed_and_other_files_are_not_taken_for_shards(shard, tmp_path):
    joined, gz, text = tmp_path / "j.tar", tmp_path / "g.tar", tmp_path / "t.tar"
    joined.write_bytes(shard.read_bytes() * 2)
    text.write_text("<html>not found</html>" * 100)
    with tarfile.open(gz, "w:gz") as tar:
        tar.add(shard, "0001.txt")
    with pytest.raises(ShardError, match="after the end-of-archive marker"):
        build_index(joined)
    for path in (gz, text):
        with pytest.raises(ShardError, match="plain tars"):
            build_index(path)


def add(tar: tarfile.TarFile, name: str, kind: bytes = tarfile.REGTYPE) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "target"
    info.size = 1 if kind == tarfile.REGTYPE else 0
    tar.addfile(info, io.BytesIO(b"x"))


def test_headers_made_to_harm_are_refused(tmp_path):
    path = tmp_path / "x.tar"

    def write(form: int = tarfile.USTAR_FORMAT, **fields) -> bytes:
        with tarfile.open(path, "w", format=form) as tar:
            info = tarfile.TarInfo("1.txt")
            for name, value in fields.items():
                setattr(info, name, value)
            tar.addfile(info)
        return path.read_bytes()

    write(tarfile.PAX_FORMAT, pax_headers={"comment": "x" * (2 << 20)})
    with pytest.raises(ShardError, match="an extended header of"):
        build_index(path)
    block = bytearray(write()[:512])
    block[124:136] = b"\xff" * 11 + b"\x00"  # -256: would send the reader back, for ever
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    path.write_bytes(bytes(block) + bytes(10240))
    with pytest.raises(ShardError, match="negative size"):
        build_index(path)
    write(type=tarfile.GNUTYPE_SPARSE)
    with pytest.raises(ShardError, match=r"1\.txt is a link or sparse"):
        build_index(path)


def test_a_shard_that_is_cut_while_in_use_is_an_error(shard):
    shard_set = ShardSet(str(shard))
    shard_set.read(0, 0)  # it is open now
    os.truncate(shard, 3000)
    with pytest.raises(ShardError, match="became shorter while in use"):
        shard_set.read(0, 5)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["1.txt", "2.txt", "1.png"], "'1', byte 2048: a second sample"),
        (["1.txt", "1.TXT"], "'1', byte 1024: a second member 'txt'"),
    ],
)
def test_ambiguous_keys_are_errors_that_name_the_place(tmp_path, names, message):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name in names:
            add(tar, name)
    with pytest.raises(ShardError, match=message):
        build_index(path)


def test_links_are_errors_and_folders_are_not(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "folder.d", tarfile.DIRTYPE)
        add(tar, "folder.d/1.txt")
        add(tar, "folder.d/2.txt", tarfile.SYMTYPE)
    with pytest.raises(ShardError, match=r"2\.txt is a link"):
        build_index(path)


def test_the_index_is_built_once_and_again_when_the_shard_changes(shard, write_tar, monkeypatch, pair):
    built = []
    real = index.build_index
    monkeypatch.setattr(index, "build_index", lambda path, *args: built.append(path) or real(path, *args))
    first = everything(ShardSet(str(shard)))
    assert everything(ShardSet(str(shard))) == first
    assert len(built) == 1
    place = shard.with_name("x.tar.index.jsonl")
    place.write_bytes(place.read_bytes().replace(b"0001", b"0009"))  # damaged
    assert everything(ShardSet(str(shard))) == first
    write_tar("x.tar", {"0001": pair(50)})
    os.utime(shard, ns=(1, 1))
    assert everything(ShardSet(str(shard))) == {"0001": pair(50)}
    assert len(built) == 3


def test_a_read_only_folder_leaves_the_index_in_the_cache(shard, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    real = index.store
    monkeypatch.setattr(index, "store", lambda p, d: p.parent != shard.parent and real(p, d))
    ShardSet(str(shard))
    assert not list(shard.parent.glob("*.jsonl"))
    assert len(list((tmp_path / "cache").rglob("*.jsonl"))) == 1
    monkeypatch.setattr(index, "build_index", None)  # is not called
    assert len(everything(ShardSet(str(shard)))) == 6


def test_a_shard_that_changes_while_in_use_is_an_error(shard, write_tar, pair):
    shard_set = ShardSet(str(shard))
    write_tar("x.tar", {"0001": pair(50)})
    os.utime(shard, ns=(1, 1))
    with pytest.raises(ShardError, match="altered while in use"):
        shard_set.read(0, 0)


def test_the_manifest_follows_the_data_not_the_place_or_time(write_tar, tmp_path, pair):
    a = write_tar("a.tar", {"1": pair(1)})
    before = ShardSet(str(a)).manifest
    os.utime(a, ns=(1, 1))
    assert ShardSet(str(a)).manifest == before
    assert ShardSet(str(a)).manifest != ShardSet(str(write_tar("b.tar", {"1": pair(1)}))).manifest
    write_tar("a.tar", {"2": pair(1)})
    os.utime(a, ns=(2, 2))
    assert ShardSet(str(a)).manifest != before


def test_ranges_lists_and_globs_name_shards_in_order(write_tar, tmp_path, pair):
    for name in ("p-008.tar", "p-009.tar", "p-010.tar"):
        write_tar(name, {name[:5]: pair(1)})
    ranged = expand(str(tmp_path / "p-{008..010}.tar"))
    assert [path.name for path in ranged] == ["p-008.tar", "p-009.tar", "p-010.tar"]
    assert expand(str(tmp_path / "*.tar")) == ranged
    assert expand([str(path) for path in ranged]) == ranged


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ([], "empty"),
        ("", "empty"),
        ("none-*.tar", "none-.*matches no file"),
        ("x-{000..002}.tar", r"x-000\.tar, which is not there"),
        ("x-{0..2.tar", "x-"),
        (".", r"folder .*\./\*\.tar"),
        ("pipe:cat x.tar", "shards are local files, or begin with https"),
        ("s3://bucket/x.tar", "not a local file: this needs shards on disk"),
    ],
)
def test_a_wrong_list_of_shards_says_what_to_change(patterns, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        expand(patterns)


def test_a_shard_given_twice_or_without_samples_is_an_error(shard, write_tar):
    with pytest.raises(ValueError, match="twice"):
        expand([str(shard), str(shard.parent / "*.tar")])
    with pytest.raises(ValueError, match="no sample"):
        ShardSet(str(write_tar("empty.tar", {})))


def test_a_shard_altered_in_place_has_another_content_and_the_same_digest(shard, monkeypatch):
    before = ShardSet(str(shard))
    (offset, _) = build_index(shard).samples()[2][1]["txt"]
    data = bytearray(shard.read_bytes())
    data[offset] ^= 1
    shard.write_bytes(bytes(data))
    os.utime(shard, ns=(1, 1))
    after = ShardSet(str(shard))
    assert after.digests == before.digests and after.contents != before.contents
    monkeypatch.setattr(index, "SMALL", 0)  # a large one, whose index was made by `flamingo data index`
    os.utime(shard, ns=(2, 2))
    assert ShardSet(str(shard)).contents == after.contents

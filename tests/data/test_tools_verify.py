"""Every damage is found and named, no partial sample passes, no good one is lost."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flamingo.cli import app
from flamingo.data.index import build_index
from flamingo.data.kinds._members import example_png as png
from flamingo.data.shards import ShardSet
from flamingo.data.tools.executors import Executor
from flamingo.data.tools.verify import verify
from flamingo.data.writing import write_tars

COUNT, HIT = 12, 5  # samples of the shard; the one that a damage hits
ONE = Executor(workers=1)


def samples() -> list[tuple[str, dict[str, bytes]]]:
    return [(f"{n:03d}", {"png": png((n, 0, 0)), "txt": f"caption {n}".encode()}) for n in range(COUNT)]


def tar(members: list[tuple[str, bytes]], **fields) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def listed() -> list[tuple[str, bytes]]:
    return [(f"{key}.{ending}", data) for key, members in samples() for ending, data in members.items()]


GOOD = tar(listed())


def infos(data: bytes) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return {info.name: info for info in archive}


HEADERS = infos(GOOD)


def header(name: str) -> int:
    return HEADERS[name].offset


def data_of(name: str) -> int:
    return HEADERS[name].offset_data


def changed(at: int, new: bytes) -> bytes:
    return GOOD[:at] + new + GOOD[at + len(new) :]


def resized(name: str, size: bytes) -> bytes:
    """The header with another size field and a checksum that fits."""
    at = header(name)
    block = bytearray(GOOD[at : at + 512])
    block[124:136] = size.ljust(12, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return changed(at, bytes(block))


def replaced(name: str, data: bytes) -> bytes:
    return tar([(n, data if n == name else d) for n, d in listed()])


def inserted(after: str, *new: tuple[str, bytes]) -> bytes:
    members = listed()
    place = [name for name, _ in members].index(after) + 1
    return tar(members[:place] + list(new) + members[place:])


def linked() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in listed():
            info = tarfile.TarInfo(name)
            if name == f"{HIT:03d}.png":
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
                archive.addfile(info)
            else:
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


ALL = set(range(COUNT))
OTHERS = ALL - {HIT}
IMAGE, CAPTION = f"{HIT:03d}.png", f"{HIT:03d}.txt"
BEFORE = set(range(HIT))

# name -> (bytes of the shard, the fault's name, samples that are good)
DAMAGES: dict[str, tuple[bytes, str, set[int]]] = {
    "cut at a member's border": (GOOD[: header(CAPTION)], "no end marker", BEFORE),
    "cut at a sample's border": (GOOD[: header(IMAGE)], "no end marker", BEFORE),
    "cut in a header": (GOOD[: header(CAPTION) + 100], "no end marker", BEFORE),
    "cut in the data": (GOOD[: data_of(IMAGE) + 20], "truncated member", BEFORE),
    "end marker missing": (GOOD[: header(f"{COUNT - 1:03d}.txt") + 1024], "no end marker", ALL),
    "header of an image": (changed(header(IMAGE) + 3, b"\xff"), "damaged header", OTHERS),
    "header of a caption": (changed(header(CAPTION) + 3, b"\xff"), "damaged header", OTHERS),
    "header wiped out": (changed(header(IMAGE), bytes(512)), "data after the end", OTHERS),
    "first header": (changed(3, b"\xff"), "damaged header", ALL - {0}),
    "data of an image": (changed(data_of(IMAGE) + 30, b"\xff\xff\xff\xff"), "damaged image", OTHERS),
    "caption that is not UTF-8": (changed(data_of(CAPTION), b"\xff"), "bad text", OTHERS),
    "size field absurd": (resized(IMAGE, b"77777777777"), "truncated member", OTHERS),
    "size field negative": (resized(IMAGE, b"\xff" * 12), "truncated member", OTHERS),
    "size field not a number": (resized(IMAGE, b"zzzz"), "damaged header", OTHERS),
    "a block lost": (GOOD[: data_of(IMAGE)] + GOOD[data_of(IMAGE) + 512 :], "incomplete sample", OTHERS),
    "unaligned bytes between": (
        GOOD[: header(IMAGE)] + b"x" * 77 + GOOD[header(IMAGE) :],
        "damaged header",
        ALL,
    ),
    "tars joined by cat": (
        tar(listed()[:10]) + tar(listed()[10:]),
        "data after the end",
        ALL,
    ),
    "garbage behind the end": (GOOD + b"garbage", "data after the end", ALL),
    "second member of a name": (
        inserted(CAPTION, (CAPTION, b"another")),
        "second member of this name",
        OTHERS,
    ),
    "second sample of a key": (
        inserted("008.txt", (IMAGE, png("red")), (CAPTION, b"other")),
        "second sample with this key",
        ALL,
    ),
    "image without text": (tar([m for m in listed() if m[0] != CAPTION]), "missing member", OTHERS),
    "text without image": (tar([m for m in listed() if m[0] != IMAGE]), "missing member", OTHERS),
    "empty image": (replaced(IMAGE, b""), "damaged image", OTHERS),
    "empty text": (replaced(CAPTION, b""), "no text", OTHERS),
    "HTML in place of an image": (replaced(IMAGE, b"<html>not found</html>"), "damaged image", OTHERS),
    "link in place of an image": (linked(), "link or sparse member", OTHERS),
    "compressed": (gzip.compress(GOOD), "not a plain tar", set()),
    "empty file": (b"", "not a plain tar", set()),
    "a web page": (b"<html>" * 400, "damaged header", set()),
}


@pytest.fixture
def shard(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(data: bytes) -> Path:
        (tmp_path / "in").mkdir(exist_ok=True)
        path = tmp_path / "in" / "s-0.tar"
        path.write_bytes(data)
        return path

    return write


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damage_is_named_and_exactly_the_good_samples_are_saved(shard, tmp_path, name):
    data, fault, good = DAMAGES[name]
    path = shard(data)
    out = tmp_path / "clean"
    report = verify([str(path)], "pairs", repair=out, executor=ONE)
    assert fault in report.counts()
    assert all(where == "s-0.tar" and 0 <= found.offset <= len(data) for where, found in report.faults)
    assert report.shards["s-0.tar"]["samples"] >= len(good)
    saved = {}
    if good:
        clean = ShardSet(str(out / "*.tar"))
        saved = {clean.key(0, n): clean.read(0, n) for n in range(int(clean.counts[0]))}
        assert not verify([str(out / "*.tar")], "pairs", executor=ONE).faults
    expected = {key: members for number, (key, members) in enumerate(samples()) if number in good}
    assert {key: members for key, members in saved.items() if not key.endswith("-2")} == expected
    extra = {key for key in saved if key.endswith("-2")}
    assert extra == ({f"{HIT:03d}-2"} if name == "second sample of a key" else set())


def test_a_sound_shard_has_no_fault(shard):
    report = verify([str(shard(GOOD))], "pairs", executor=ONE)
    assert report.faults == []
    assert report.shards["s-0.tar"]["samples"] == COUNT


def test_documents_of_different_sizes_are_not_taken_for_damaged_ones(shard, tmp_path):
    """Beside a damage an interleaved document with fewer images than others is still good."""
    members = []
    for number in range(8):
        items = [{"image": f"{i}.png"} for i in range(number % 3)] + [{"text": f"t{number}"}]
        members.append((f"{number}.json", json.dumps({"items": items}).encode()))
        members += [(f"{number}.{i}.png", png()) for i in range(number % 3)]
    data = tar(members)
    at = infos(data)["4.json"].offset
    path = shard(data[:at] + b"\xff" * 200 + data[at + 200 :])
    report = verify([str(path)], "interleaved", repair=tmp_path / "out", executor=ONE)
    clean = ShardSet(str(tmp_path / "out" / "*.tar"))
    assert list(chain.from_iterable(clean.keys())) == ["0", "1", "2", "3", "5", "6", "7"]
    assert report.counts()["damaged header"] == 1


def test_long_names_survive_and_huge_extended_headers_are_refused(shard, tmp_path):
    long = "a/" * 80 + "x" * 200
    data = tar([(f"{long}.png", png()), (f"{long}.txt", b"words"), *listed()])
    report = verify([str(shard(data))], "pairs", executor=ONE)
    assert report.faults == []
    assert report.shards["s-0.tar"]["samples"] == COUNT + 1
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("bomb.txt")
        info.pax_headers = {"comment": "x" * (2 << 20)}
        archive.addfile(info, io.BytesIO())
    report = verify([str(shard(file.getvalue()[:-10240] + GOOD))], "pairs", executor=ONE)
    assert "an extended header of" in report.faults[0][1].detail
    assert report.shards["s-0.tar"]["samples"] == COUNT


def test_without_a_kind_a_sample_that_lost_a_member_is_left_out_too(shard, tmp_path):
    """Also where the sound ones are not all alike: half of the pictures are JPEGs by name."""
    members = [(f"{n}.{ending}", b"x") for n in range(8) for ending in (("png", "jpg")[n % 2], "txt")]
    members += [(f"9.{ending}", b"x") for ending in ("json", "0.png", "1.png")]
    members += [(f"10.{ending}", b"x") for ending in ("json", "0.png", "1.png", "2.png")]
    data = tar(members)
    for lost, key in (("4.txt", "4"), ("5.jpg", "5"), ("9.json", "9")):
        at = infos(data)[lost].offset
        path = shard(data[:at] + b"\xff" * 200 + data[at + 200 :])
        report = verify([str(path)], repair=tmp_path / lost, executor=ONE)
        assert {f.fault for _, f in report.faults} == {"incomplete sample", "damaged header"}
        kept = ["0", "1", "2", "3", "4", "5", "6", "7", "9", "10"]
        kept.remove(key)
        assert list(chain.from_iterable(ShardSet(str(tmp_path / lost / "*.tar")).keys())) == kept


def test_a_clean_copy_is_of_the_shard_as_it_is(shard, tmp_path):
    path, out = shard(GOOD), tmp_path / "clean"
    verify([str(path)], repair=out, executor=ONE)
    path.write_bytes(tar(listed()[2:]))
    with pytest.raises(ValueError, match="choose another folder"):
        verify([str(path)], repair=out, executor=ONE)


def test_shards_of_several_folders_have_copies_of_their_own(tmp_path):
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "b.tar").write_bytes(GOOD)
    (tmp_path / "in" / "a_b.tar").write_bytes(tar(listed()[:2]))
    report = verify([str(tmp_path / "in" / "**" / "*.tar")], repair=tmp_path / "out", executor=ONE)
    assert sorted(told["samples"] for told in report.shards.values()) == [1, COUNT]
    assert sorted(ShardSet(str(tmp_path / "out" / "*.tar")).counts) == [1, COUNT]


def test_members_of_any_name_are_copied(shard, tmp_path):
    verify([str(shard(tar([("0.txt", b"t"), ("0._meta", b"m")])))], repair=tmp_path / "out", executor=ONE)
    assert ShardSet(str(tmp_path / "out" / "*.tar")).read(0, 0) == {"txt": b"t", "_meta": b"m"}


def test_a_sample_that_is_too_large_is_a_fault_with_and_without_a_kind(shard):
    path = shard(
        tar([("0.png", png()), ("0.txt", b"words"), ("1.png", png() + bytes(2 << 20)), ("1.txt", b"x")])
    )
    for kind in (None, "pairs"):
        report = verify([str(path)], kind, max_sample_mb=1, executor=ONE)
        assert [(f.key, f.fault) for _, f in report.faults] == [("1", "too large sample")]
    with pytest.raises(ValueError, match="name it with --kind"):
        verify([str(path)], options={"min_side": 3}, executor=ONE)


def test_checksums_of_the_card_are_compared_and_lost_shards_are_named(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    files = write_tars(folder, "s", iter(samples()), 4)
    card = {"settings": {}, "counts": {}, "files": files, "licence": ""}
    (folder / "dataset.json").write_text(json.dumps(card))
    pattern = str(folder / "*.tar")
    assert verify([pattern], "pairs", executor=ONE).faults == []
    path = folder / "s-000001.tar"
    data = bytearray(path.read_bytes())
    at = data.index(b"caption 5")
    data[at : at + 9] = b"caption 6"  # a sound tar, a sound sample, and not what was written
    path.write_bytes(bytes(data))
    (folder / "s-000002.tar").unlink()
    found = [
        (shard.rpartition("/")[2], fault.fault)
        for shard, fault in verify([pattern], "pairs", executor=ONE).faults
    ]
    assert found == [("s-000001.tar", "not the file of dataset.json"), ("s-000002.tar", "missing shard")]


def test_the_command_names_faults_writes_json_and_fails(shard, tmp_path):
    path = shard(DAMAGES["data of an image"][0])
    json_file = tmp_path / "report.json"
    arguments = ["data", "verify", str(path), "--kind", "pairs", "--json", str(json_file), "--workers", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert f"s-0.tar, sample '{HIT:03d}', byte {header(IMAGE)}: damaged image" in result.output
    assert "11 good samples; faults: 1 x damaged image" in result.output
    assert json.loads(json_file.read_text())["faults"] == {"damaged image": 1}
    shard(GOOD)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    assert "12 good samples; faults: none" in result.output


def test_what_the_index_refuses_verify_names(shard):
    """Whatever stops training has a fault here."""
    for data, _, _ in DAMAGES.values():
        path = shard(data)
        try:
            build_index(path)
        except ValueError:
            assert verify([str(path)], "pairs", executor=ONE).faults

"""Shards in stores are the same shards, whatever the store does on the way."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from flamingo.data import far, remote
from flamingo.data.document import Image
from flamingo.data.errors import ShardError
from flamingo.data.index import ShardIndex, build_index, spell
from flamingo.data.places import check_address
from flamingo.data.remote import Background, Gone, Info, ObjectStore, Passing, Remote, WebStore, info_of
from flamingo.data.shards import ShardSet
from flamingo.data.stream import Stream
from tests.data.loopback import Loopback, serving


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")


@pytest.fixture
def server(source, tmp_path):
    """Holds the five shards of `source` under /data/."""
    with serving() as served:
        for path in sorted(tmp_path.glob("s-*.tar")):
            served.files[f"/data/{path.name}"] = path.read_bytes()
        yield served


@pytest.fixture
def quick(tmp_path) -> Remote:
    return Remote(cache_dir=str(tmp_path / "cache"), attempts=4, backoff=0.01, timeout=0.4, threads=2)


def contents(shards: ShardSet) -> list[tuple[str, dict[str, bytes]]]:
    return [
        (shards.key(shard, sample), shards.read(shard, sample))
        for shard, count in enumerate(shards.counts)
        for sample in range(count)
    ]


def shown(read) -> tuple:
    document, skipped = read
    items = [item.image.tobytes() if isinstance(item, Image) else item for item in document.items]
    return document.key, document.seed, items, skipped


def far_away(server: Loopback, quick: Remote) -> ShardSet:
    return ShardSet(f"{server.address}/data/s-{{0..4}}.tar", remote=quick)


def test_shards_of_a_web_server_are_the_same_shards(server, source, quick):
    here, there = ShardSet(source.shards), far_away(server, quick)
    assert contents(there) == contents(here)
    assert there.manifest == here.manifest  # a run may move to a copy of its shards


def test_documents_and_their_order_equal_those_of_local_shards(server, source, quick):
    there = source.model_copy(update={"shards": f"{server.address}/data/s-{{0..4}}.tar", "remote": quick})
    streams = [Stream(s, seed=3) for s in (source, there)]
    for position in range(60):  # two epochs and a half
        here, away = (stream.read(position) for stream in streams)
        assert shown(here) == shown(away)


@pytest.mark.parametrize("fault", ["stall", "reset", "cut", "500", "503", "429", "html", "plain html"])
def test_a_passing_fault_changes_nothing(fault, server, source, quick):
    path = "/data/s-1.tar"
    server.faults[path] = [fault, fault]
    assert contents(far_away(server, quick)) == contents(ShardSet(source.shards))
    assert len(server.gets(path)) == 3


@pytest.mark.parametrize("fault", ["stall", "cut"])  # a reset may take with it what had arrived
def test_a_broken_transfer_goes_on_where_it_broke(fault, server, quick):
    server.faults["/data/s-1.tar"] = [fault]
    far_away(server, quick)
    again = server.gets("/data/s-1.tar")[-1]
    assert again == f"bytes={len(server.files['/data/s-1.tar']) // 2}-"


def test_only_tries_without_a_byte_count(server, source, quick):
    two = quick.model_copy(update={"attempts": 2})
    server.faults["/data/s-1.tar"] = ["cut", "500"]  # one try with bytes, one without
    assert contents(far_away(server, two)) == contents(ShardSet(source.shards))
    server.faults["/data/s-1.tar"] = ["cut", "500", "500"]
    with pytest.raises(ShardError, match=r"byte [1-9]\d*: gave up after 2 tries: status 500"):
        far_away(server, two.model_copy(update={"cache_dir": f"{two.cache_dir}2"}))


@pytest.mark.parametrize("quirk", ["no HEAD", "no Range"])
def test_a_server_of_few_skills_is_enough(quirk, server, source, quick):
    server.quirks.add(quirk)
    server.faults["/data/s-2.tar"] = ["cut"]
    assert contents(far_away(server, quick)) == contents(ShardSet(source.shards))


def test_other_bytes_than_asked_for_are_an_error(server, quick):
    server.quirks.add("other Range")
    server.faults["/data/s-2.tar"] = ["cut"]
    with pytest.raises(ShardError, match=r"s-2\.tar.*the server sent bytes"):
        far_away(server, quick)


@pytest.mark.parametrize(
    ("fault", "message", "tries"),
    [
        ("500*", "gave up after 4 tries: status 500", 4),
        ("html*", "gave up after 4 tries: a web page", 4),
        ("plain html*", "gave up after 4 tries: a web page in place of a tar", 4),
        ("403", "status 403", 1),
    ],
)
def test_a_fault_that_stays_names_shard_and_reason(fault, message, tries, server, quick, tmp_path):
    server.faults["/data/s-1.tar"] = [fault]
    with pytest.raises(ShardError, match=rf"(?s)127\.0\.0\.1.*s-1\.tar.*{message}"):
        far_away(server, quick)
    assert len(server.gets("/data/s-1.tar")) == tries
    assert not list((tmp_path / "cache").rglob("*.part"))  # and nothing half-fetched is left


def test_a_shard_that_is_not_there_fails_at_once(server, quick):
    del server.files["/data/s-3.tar"]
    with pytest.raises(ShardError, match=r"s-3\.tar.*status 404"):
        far_away(server, quick)
    assert [path for _, path, _ in server.asked].count("/data/s-3.tar") == 1


def test_a_shard_replaced_while_it_is_fetched_is_an_error(server, quick):
    path = "/data/s-1.tar"
    info = info_of(server.address + path, quick)
    server.files[path] = bytes(len(server.files[path]))
    with pytest.raises(ShardError, match="replaced while it was read"), open(os.devnull, "wb") as sink:
        remote.fetch(server.address + path, info, sink, quick)


def test_a_store_that_sends_more_than_it_announced_is_an_error(server, quick, tmp_path):
    address = f"{server.address}/data/s-1.tar"
    info = info_of(address, quick)
    with pytest.raises(ShardError, match="more than the"), open(tmp_path / "sink", "wb") as sink:
        remote.fetch(address, info._replace(size=info.size - 1), sink, quick)
    assert (tmp_path / "sink").stat().st_size < info.size


def test_redirects_are_followed_to_allowed_addresses_only(server, source, quick):
    server.moved["/data/s-1.tar"] = f"{server.address}/data/other.tar"
    server.files["/data/other.tar"] = server.files["/data/s-1.tar"]
    assert contents(far_away(server, quick)) == contents(ShardSet(source.shards))
    for target in ("http://169.254.169.254/latest", "file:///etc/passwd", "ftp://127.0.0.1/x"):
        server.moved["/data/s-1.tar"] = target
        with pytest.raises(ShardError, match=r"redirected to .*not allowed"):
            info_of(f"{server.address}/data/s-1.tar", quick)
    server.moved["/data/s-1.tar"] = f"{server.address}/data/s-1.tar"
    with pytest.raises(ShardError, match="redirects"):
        info_of(f"{server.address}/data/s-1.tar", quick)


def test_a_redirect_from_https_to_http_is_refused(quick):
    store = WebStore(quick)
    plain = SimpleNamespace(is_redirect=True, headers={"Location": "http://127.0.0.1/x"}, close=lambda: None)
    store.session = SimpleNamespace(request=lambda *_, **__: plain)  # type: ignore[assignment]
    with pytest.raises(Gone, match="from https to http"):
        store.info("https://example.org/x.tar")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("pipe:cat x", "local files, or begin with"),
        ("file:///etc/passwd", "local files, or begin with"),
        ("ftp://h/x.tar", "local files, or begin with"),
        ("ssh://h/x.tar", "local files, or begin with"),
        ("s3:x.tar", "local files, or begin with"),
        ("http://example.org/x.tar", "allow_http=true"),
        ("https://example.org/*.tar", r"cannot list files; write a range"),
    ],
)
def test_addresses_that_are_not_allowed_are_refused_before_any_connection(address, message, quick):
    with pytest.raises(ValueError, match=message):
        ShardSet(address, remote=quick)
    assert check_address("http://example.org/x.tar", allow_http=True)


def test_an_index_beside_a_shard_saves_fetching_it(server, source, quick, tmp_path):
    for path in tmp_path.glob("s-*.tar"):
        server.files[f"/data/{path.name}.index.jsonl"] = spell(build_index(path))
    there = far_away(server, quick)
    assert there.manifest == ShardSet(source.shards).manifest
    assert not any(server.gets(f"/data/s-{number}.tar") for number in range(5))
    assert contents(there) == contents(ShardSet(source.shards))


@pytest.mark.parametrize("lie", ["beyond the end", "another size", "no index"])
def test_an_index_that_lies_is_not_believed(lie, server, source, quick, tmp_path):
    good = build_index(tmp_path / "s-1.tar")
    samples = [
        (key, {name: [offset + 10**9, 5] for name, (offset, _) in m.items()}) for key, m in good.samples()
    ]
    false = {
        "beyond the end": spell(ShardIndex(good.size, 0, good.count, json.dumps(samples).encode())),
        "another size": spell(ShardIndex(good.size + 512, 0, good.count, good.table)),
        "no index": b"\x80\x04pickle",
    }
    server.files["/data/s-1.tar.index.jsonl"] = false[lie]
    assert contents(far_away(server, quick)) == contents(ShardSet(source.shards))


def test_an_index_of_another_shard_of_the_same_size_is_an_error(server, source, quick, write_tar, pair):
    number, count = 0, 5  # s-0.tar; the last sample alone differs, and the tars are padded alike
    good = {f"{n:04d}": pair(n) for n in range(count)}
    for change in ({"0004": {**pair(4), "txt": b"another caption"}}, {"9999": pair(4), "0004": {}}):
        other = write_tar(
            "other.tar", {key: members for key, members in {**good, **change}.items() if members}
        )
        assert other.stat().st_size == len(server.files[f"/data/s-{number}.tar"])
        server.files[f"/data/s-{number}.tar.index.jsonl"] = spell(build_index(other))
        there = ShardSet(f"{server.address}/data/s-{number}.tar", remote=quick)
        with pytest.raises(ShardError, match=r"s-0\.tar.*its \.index\.jsonl is of another file"):
            there.read(0, 0)
        quick = quick.model_copy(update={"cache_dir": f"{quick.cache_dir}2"})


def test_a_checksum_beside_the_shards_is_checked(server, source, quick, tmp_path):
    files = {p.name: {"sha256": hashlib.sha256(p.read_bytes()).hexdigest()} for p in tmp_path.glob("s-*.tar")}
    server.files["/data/dataset.json"] = json.dumps({"files": files}).encode()
    assert contents(far_away(server, quick)) == contents(ShardSet(source.shards))
    altered = bytearray(server.files["/data/s-1.tar"])
    altered[600] ^= 1  # a byte of a picture: the tar stays sound
    server.files["/data/s-1.tar"] = bytes(altered)
    with pytest.raises(ShardError, match=r"s-1\.tar.*sha256 is .*should be"):
        far_away(server, quick.model_copy(update={"cache_dir": str(tmp_path / "other")}))
    assert len(list((tmp_path / "other").rglob("*.tar"))) <= 4


def test_a_damaged_shard_is_named_by_its_address(server, quick):
    server.files["/data/s-1.tar"] = server.files["/data/s-1.tar"][:3000]
    with pytest.raises(ShardError, match=rf"{server.address}/data/s-1\.tar.*unexpected end of data"):
        far_away(server, quick)


def test_a_deleted_cache_is_made_again(server, source, quick, tmp_path):
    there = far_away(server, quick)
    for path in [*(tmp_path / "cache").rglob("*.tar"), *(tmp_path / "cache").rglob("*.jsonl")]:
        path.unlink()
    assert contents(there) == contents(ShardSet(source.shards))


def test_a_scheme_whose_package_is_missing_says_what_to_install(quick, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ValueError, match=r"flamingo-vlm\[remote\]"):
        ShardSet("gs://bucket/x.tar", remote=quick)


@pytest.fixture(scope="module")
def s3():
    """An S3 server in this process, with a bucket `corpus`."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    patch = pytest.MonkeyPatch()
    host, port = server.get_host_and_port()
    settings = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_REGION": "us-east-1"}
    settings |= {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**settings, "no_proxy": "127.0.0.1"}.items():
        patch.setenv(name, value)
    import s3fs

    files = s3fs.S3FileSystem(skip_instance_cache=True)
    files.mkdir("corpus")
    yield files
    patch.undo()
    server.stop()


def test_shards_of_an_s3_bucket_are_the_same_shards(s3, source, tmp_path, quick):
    for path in tmp_path.glob("s-*.tar"):
        s3.pipe(f"corpus/data/{path.name}", path.read_bytes())
    patient = quick.model_copy(update={"timeout": 20.0})
    here = ShardSet(source.shards)
    for pattern in ("s3://corpus/data/s-{0..4}.tar", "s3://corpus/data/*.tar"):
        there = ShardSet(pattern, remote=patient)
        assert contents(there) == contents(here)
        assert there.manifest == here.manifest


def test_what_is_not_in_a_bucket_is_named(s3, quick):
    patient = quick.model_copy(update={"timeout": 20.0})
    with pytest.raises(ShardError, match=r"s3://corpus/none\.tar.*not there"):
        ShardSet("s3://corpus/none.tar", remote=patient)
    with pytest.raises(ValueError, match="matches no file"):
        ShardSet("s3://corpus/none-*.tar", remote=patient)


def test_large_objects_come_in_stretches(s3, source, tmp_path, quick, monkeypatch):
    monkeypatch.setattr(remote, "STRETCH", 1000)
    s3.pipe("corpus/one/s-2.tar", (tmp_path / "s-2.tar").read_bytes())
    there = ShardSet("s3://corpus/one/s-2.tar", remote=quick.model_copy(update={"timeout": 20.0}))
    assert contents(there) == contents(ShardSet(tmp_path / "s-2.tar"))


def test_an_object_that_comes_short_is_asked_for_again(quick):
    store = ObjectStore.__new__(ObjectStore)
    store.remote, store.pool = quick, Background(1)
    short = SimpleNamespace(cat_file=lambda address, start, end: bytes(end - start - 1))
    store.system = short  # type: ignore[assignment]
    with pytest.raises(Passing, match="9 bytes where 10 were asked for"):
        list(store.blocks("s3://corpus/x", 0, Info(10, "")))


def test_fetching_ahead_brings_the_next_window(server, source, quick, tmp_path):
    import time

    for path in tmp_path.glob("s-*.tar"):  # so that nothing is fetched only to be indexed
        server.files[f"/data/{path.name}.index.jsonl"] = spell(build_index(path))
    there = source.model_copy(update={"shards": f"{server.address}/data/s-{{0..4}}.tar", "remote": quick})
    stream = Stream(there, seed=3)
    assert not list((tmp_path / "cache" / "shards").glob("*.tar"))
    stream.read(0)
    assert isinstance(stream.shards.far, far.Far)
    for _ in range(500):
        if len(list((tmp_path / "cache" / "shards").glob("*.tar"))) == 4:  # two windows of two shards
            break
        time.sleep(0.02)
    else:
        pytest.fail("the next window was not fetched")
    assert sum(len(server.gets(f"/data/s-{number}.tar")) for number in range(5)) == 4


def test_a_process_that_ends_does_not_wait_for_what_it_fetches_ahead(server, source, tmp_path):
    server.files["/data/s-1.tar.index.jsonl"] = spell(build_index(tmp_path / "s-1.tar"))
    server.faults["/data/s-1.tar"] = ["stall*"]
    code = (
        "import sys; sys.argv[0] = 'flamingo'\n"  # a command, whose import registers no model
        "from flamingo.data.far import Far; from flamingo.data.remote import Remote\n"
        f"remote = Remote(cache_dir={str(tmp_path / 'cache')!r}, attempts=10**6, backoff=0)\n"
        "Far(sys.argv[1:], remote).prefetch([], sys.argv[1:])"
    )
    address = f"{server.address}/data/s-1.tar"
    assert subprocess.run([sys.executable, "-c", code, address], timeout=60).returncode == 0

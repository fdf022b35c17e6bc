"""The cache of fetched shards: shared, bounded, never half-written, never taken from a reader."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flamingo.data import cache
from flamingo.data.cache import ShardCache
from flamingo.data.index import store
from flamingo.data.remote import Remote, info_of
from tests.data.loopback import serving

SIZE = 100_000  # bytes of a file
COMMAND = "import sys; sys.argv[0] = 'flamingo'\n"  # whose import registers no model: seconds saved


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as served:
        for number in range(6):
            served.files[f"/{number}.tar"] = bytes([number]) * SIZE
        yield served


@pytest.fixture
def open_(server, tmp_path):
    """open_(number, files) opens a file through a cache that holds so many."""

    def call(number: int, files: float, wait: float = 0.3) -> int:
        settings = Remote(
            cache_dir=str(tmp_path / "c"), cache_gb=files * SIZE / 2**30, attempts=2, backoff=0, timeout=wait
        )
        address = f"{server.address}/{number}.tar"
        return ShardCache(settings).open(address, info_of(address, settings))

    return call


def held(tmp_path) -> int:
    return sum(path.stat().st_size for path in (tmp_path / "c" / "shards").iterdir() if path.is_file())


def test_the_bound_holds_and_the_least_recent_goes_first(open_, server, tmp_path):
    for number in (0, 1, 2, 0, 3):  # 1 is the oldest when 3 comes
        descriptor = open_(number, files=3)
        assert os.read(descriptor, 9) == bytes([number]) * 9
        os.close(descriptor)
        assert held(tmp_path) <= 3 * SIZE
    for number in (0, 2, 3):
        os.close(open_(number, files=3))
    fetched = [len(server.gets(f"/{number}.tar")) for number in range(4)]
    assert fetched == [1, 1, 1, 1]
    os.close(open_(1, files=3))
    assert len(server.gets("/1.tar")) == 2


def test_a_file_that_is_open_stays(open_, server, tmp_path):
    first = open_(0, files=2)
    for number in (1, 2, 3):
        os.close(open_(number, files=2))
    assert os.pread(first, SIZE, 0) == bytes(SIZE)
    again = open_(0, files=2)
    assert len(server.gets("/0.tar")) == 1
    os.close(first)
    os.close(again)
    for number in (1, 2):
        os.close(open_(number, files=2))
    assert held(tmp_path) == 2 * SIZE
    os.close(open_(0, files=2))
    assert len(server.gets("/0.tar")) == 2  # it went once nobody held it


def test_a_file_that_goes_while_it_is_opened_is_fetched_again(open_, server, tmp_path, monkeypatch):
    os.close(open_(0, files=2))
    (entry,) = (tmp_path / "c" / "shards").glob("*.tar")
    real, shared = fcntl.flock, []

    def flock(file, how: int) -> None:
        if how == fcntl.LOCK_SH and not shared.append(how) and len(shared) == 1:
            entry.unlink()  # another process makes room, just between opening and locking
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    descriptor = open_(0, files=2)
    assert os.fstat(descriptor).st_nlink == 1
    assert len(server.gets("/0.tar")) == 2
    os.close(descriptor)


def test_no_room_is_one_message_that_names_the_setting(open_):
    with pytest.raises(ValueError, match=r"does not fit into cache_gb=.*set cache_dir or cache_gb"):
        open_(0, files=0.5)
    descriptors = [open_(number, files=2) for number in (0, 1)]
    with pytest.raises(ValueError, match=r"in use.*cache_gb=.*raise it, or lower `window`"):
        open_(2, files=2)
    for descriptor in descriptors:
        os.close(descriptor)


def test_a_folder_that_cannot_be_written_is_told_at_once(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot be written.*FLAMINGO_CACHE"):
        ShardCache(Remote(cache_dir=str(tmp_path / "file" / "below")))


def test_processes_of_two_machines_with_the_same_number_do_no_harm(tmp_path, monkeypatch):
    real = Path.touch
    # The other one makes and removes the same file.
    monkeypatch.setattr(Path, "touch", lambda path: (real(path), path.unlink()))
    ShardCache(Remote(cache_dir=str(tmp_path / "c")))
    written = []
    monkeypatch.setattr(Path, "write_bytes", lambda path, data: written.append(path) or path.touch())
    for _ in range(2):
        store(tmp_path / "x.index.jsonl", b"")
    assert len(set(written)) == 2


def test_the_variable_names_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FLAMINGO_CACHE", str(tmp_path / "there"))
    assert ShardCache(Remote()).folder == tmp_path / "there" / "shards"


def test_a_full_disk_is_told_and_leaves_nothing(open_, tmp_path, monkeypatch):
    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache, "fetch", full)
    with pytest.raises(ValueError, match=r"is full .*set cache_dir or cache_gb"):
        open_(0, files=2)
    assert held(tmp_path) == 0


def test_what_a_killed_process_left_makes_room(open_, tmp_path):
    os.close(open_(0, files=3))
    left = tmp_path / "c" / "shards" / ("0" * 64 + ".4242.part")
    left.write_bytes(bytes(SIZE))
    os.utime(left, (1, 1))
    for number in (1, 2):
        os.close(open_(number, files=3))
    assert not left.exists()
    assert held(tmp_path) == 3 * SIZE


def test_a_process_killed_while_it_fetches_leaves_no_shard(server, tmp_path):
    server.faults["/0.tar"] = ["stall"]
    code = COMMAND + (
        "from flamingo.data.cache import ShardCache; from flamingo.data.remote import *\n"
        f"r = Remote(cache_dir={str(tmp_path / 'c')!r}, timeout=30)\n"
        "ShardCache(r).open(sys.argv[1], info_of(sys.argv[1], r))"
    )
    address = f"{server.address}/0.tar"
    process = subprocess.Popen([sys.executable, "-c", code, address])
    while not list((tmp_path / "c").rglob("*.part")) and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not list((tmp_path / "c").rglob("*.tar"))
    settings = Remote(cache_dir=str(tmp_path / "c"))
    descriptor = ShardCache(settings).open(address, info_of(address, settings))  # its locks are gone too
    assert os.read(descriptor, SIZE + 1) == bytes(SIZE)
    os.close(descriptor)


def test_processes_of_a_node_fetch_a_file_once(server, tmp_path):
    code = COMMAND + (
        "import os; from flamingo.data.cache import ShardCache; from flamingo.data.remote import *\n"
        f"r = Remote(cache_dir={str(tmp_path / 'c')!r})\n"
        "for n in range(6):\n"
        "    address = f'{sys.argv[1]}/{n}.tar'\n"
        "    fd = ShardCache(r).open(address, info_of(address, r))\n"
        "    assert os.read(fd, 200000) == bytes([n]) * 100000\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, server.address]) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert [len(server.gets(f"/{number}.tar")) for number in range(6)] == [1] * 6


def test_fetching_ahead_takes_only_room_that_is_free(server, tmp_path):
    settings = Remote(cache_dir=str(tmp_path / "c"), cache_gb=2 * SIZE / 2**30)
    shards = ShardCache(settings)
    addresses = [f"{server.address}/{number}.tar" for number in range(4)]
    infos = [info_of(address, settings) for address in addresses]
    spare = {shards.entry(address, info) for address, info in zip(addresses, infos, strict=True)}
    for address, info in zip(addresses, infos, strict=True):
        shards.prefetch(address, info, None, spare)
    assert [len(server.gets(f"/{number}.tar")) for number in range(4)] == [1, 1, 0, 0]
    assert held(tmp_path) == 2 * SIZE

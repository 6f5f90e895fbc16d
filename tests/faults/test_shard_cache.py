"""Fetching shards from stores that fail, into a cache that others use."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cached_shards import (
    HURRIED,
    SIZE,
    Serve,
    at,
    content_of,
    held,
    in_order,
    serving,
    shard,
    there,
)
from http_folder import Request, served

from moco_scale.data.remote import download, http_connection, shard_cache
from moco_scale.data.remote.download import RemoteFile, RetryPolicy, Stopped
from moco_scale.data.remote.shard_cache import SHARDS, NoRoom, ShardCache, shard_path
from moco_scale.data.remote.store import Store
from moco_scale.utils.errors import UserError


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 10 * SIZE, HURRIED)


@pytest.fixture
def target(cache: ShardCache) -> Path:
    return cache.home / "set"


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    with serving(tmp_path / "origin") as serve:
        yield serve


SURVIVED = [
    (("drop 1000", "drop 50000"), [0, 1000, 51_000]),
    (("short 1000", "drop 50000"), [0, 0, 50_000]),
    (("500", "503"), [0, 0, 0]),
    (("drop 1000", "500", "drop 50000"), [0, 1000, 1000, 51_000]),
    (("long", "drop 0"), [0, 0, 0]),
    (("drop 1000", "no range, drop 400"), [0, 1000, 400]),
    (("drop 1000", "no range"), [0, 1000]),
]
"""Faults, and from which byte on each attempt asks."""


@pytest.mark.parametrize(
    ("faults", "starts", "checksum"),
    [(*case, checksum) for case in SURVIVED for checksum in (True, False)]
    + [(("wrong", "drop 9", "wrong"), [0, 0, 9, 0], True)],
)
def test_a_shard_arrives_whole_and_right_whatever_goes_wrong_at_first(
    cache: ShardCache,
    target: Path,
    serve: Serve,
    faults: tuple[str, ...],
    starts: list[int],
    checksum: bool,
) -> None:
    server = serve(in_order(*faults))
    with cache.hold(at(server), target, shard(0, checksum)) as file:
        assert file.read() == content_of(0)
    assert [request.start for request in server.requests] == starts
    assert [path.name for path in (target / "shards").iterdir()] == [shard(0).name]
    with cache.hold(at(server), target, shard(0)) as file:
        assert file.read() == content_of(0)
    assert len(server.requests) == len(starts)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("404", ["HTTP 404", "Check the address"]),
        ("403", ["HTTP 403", "credentials"]),
        ("wrong", ["3 attempts", "3 x all of it arrived, but its checksum is wrong", "copy the"]),
        ("short 1000", ["3 attempts", f"has 1000 bytes there, its index says {SIZE}"]),
        ("long", [f"has {SIZE + 1} bytes there"]),
    ],
)
def test_what_cannot_be_mended_is_said_at_once(
    cache: ShardCache, target: Path, serve: Serve, fault: str, words: list[str]
) -> None:
    server = serve(lambda name, attempt: fault)
    with pytest.raises(UserError) as caught:
        cache.hold(at(server), target, shard(1))
    for word in [shard(1).name, f"{server.url}/{shard(1).name}", *words]:
        assert word in str(caught.value)
    assert len(server.requests) == (1 if fault.isdigit() else 3)
    assert not cache.has(target, shard(1))


def test_what_stays_broken_is_given_up_with_what_happened_how_often(
    target: Path, cache: ShardCache, serve: Serve
) -> None:
    server = serve(lambda name, attempt: "drop 1000" if attempt in (2, 5) else "500")
    short = ShardCache(cache.root, cache.limit, RetryPolicy(0.3, 0.002, 0.05))
    with pytest.raises(UserError) as caught:
        short.hold(at(server), target, shard(1))
    text = str(caught.value)
    attempts = len(server.requests)
    assert f"given up after {attempts} attempts" in text
    assert f"{attempts - 2} x HTTP 500" in text and "2 x the connection ended early" in text
    # What had arrived is not asked for again.
    assert server.requests[-1] == Request(shard(1).name, 2000)


def test_nobody_listens(cache: ShardCache, target: Path, serve: Serve) -> None:
    with served(cache.root.parent) as gone:
        store = at(gone)
    short = ShardCache(cache.root, cache.limit, RetryPolicy(0.05, 0.002, 0.01))
    with pytest.raises(UserError, match="Connection refused"):
        short.hold(store, target, shard(0))


def test_a_shard_that_advances_is_never_given_up(
    cache: ShardCache, target: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every connection breaks after a hundredth of it; together they take far more than the
    retry, by a clock that the waits alone move on."""
    now = [0.0]

    def wait(seconds: float, stopped: object) -> None:
        now[0] += seconds

    monkeypatch.setattr(download.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(download, "_sleep", wait)
    server = serve(lambda name, attempt: "drop 3000" if attempt % 3 == 2 else "503")
    retry = RetryPolicy(give_up=30.0, first_wait=1.0, longest_wait=10.0)
    ShardCache(cache.root, cache.limit, retry).fetch(at(server), target, shard(2))
    assert (target / "shards" / shard(2).name).read_bytes() == content_of(2)
    assert now[0] > 5 * retry.give_up


def test_a_silent_server_is_left_when_nobody_wants_the_shard_any_more(
    cache: ShardCache, target: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_connection, "SILENCE", 0.05)
    server = serve(lambda name, attempt: "silent")
    with pytest.raises(Stopped):
        cache.hold(at(server), target, shard(0), stopped=lambda: len(server.requests) > 1)
    assert not server.stopping.is_set()


def test_what_a_killed_process_left_is_gone_on_with(
    cache: ShardCache, target: Path, serve: Serve
) -> None:
    broken = serve(in_order("drop 70000", "404"))
    with pytest.raises(UserError, match="404"):
        cache.hold(at(broken), target, shard(3))
    server = serve(in_order())
    with cache.hold(at(server), target, shard(3)) as file:
        assert file.read() == content_of(3)
    assert server.requests == [Request(shard(3).name, 70_000)]


def test_a_left_part_of_something_else_does_no_harm(
    cache: ShardCache, target: Path, serve: Serve
) -> None:
    for checksum in (True, False):
        left = target / "shards" / f".{shard(3).name}.{SIZE}.partial"
        cache.make(target)
        left.write_bytes(b"x" * 1000)
        with cache.hold(at(serve(in_order())), target, shard(3, checksum)) as file:
            assert file.read() == content_of(3)
        os.unlink(target / "shards" / shard(3).name)


def fetch_in_child(cache: ShardCache, store: Store, target: Path, number: int) -> int:
    """Fork a process that holds a shard and checks it; its pid."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            with cache.hold(store, target, shard(number)) as file:
                status = 0 if file.read() == content_of(number) else 2
        finally:
            os._exit(status)
    return pid


def test_processes_that_want_the_same_shard_fetch_it_once(
    cache: ShardCache, target: Path, serve: Serve
) -> None:
    server = serve(in_order("drop 100000", "500"))
    children = [fetch_in_child(cache, at(server), target, 4) for _ in range(4)]
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
    assert [request.start for request in server.requests] == [0, 100_000, 100_000]


def test_the_lock_of_a_dead_fetcher_is_free(cache: ShardCache, target: Path, serve: Serve) -> None:
    server = serve(lambda name, attempt: "silent" if attempt == 0 else "")
    first = fetch_in_child(cache, at(server), target, 4)
    while not server.requests:
        time.sleep(0.01)
    second = fetch_in_child(cache, at(server), target, 4)
    os.kill(first, 9)
    assert os.waitpid(first, 0)[1] == 9
    assert os.waitpid(second, 0)[1] == 0


def test_the_least_recently_used_goes_and_never_one_that_is_mapped(
    cache: ShardCache, target: Path, serve: Serve
) -> None:
    store = at(serve(in_order()))
    small = ShardCache(cache.root, 3 * SIZE, HURRIED)
    mapped = held(small, store, target, 0)
    for number in (1, 2, 1):
        held(small, store, target, number).close()
    small.fetch(store, target, shard(3))
    assert there(target) == {0, 1, 3}
    small.fetch(store, target, shard(4), keep={target / "shards" / shard(1).name})
    assert there(target) == {0, 1, 4}
    assert mapped[:] == content_of(0)
    mapped.close()
    small.fetch(store, target, shard(5))
    assert there(target) == {1, 4, 5}


def test_a_full_cache_waits_for_what_its_owner_lets_go(
    cache: ShardCache, target: Path, serve: Serve
) -> None:
    store = at(serve(in_order()))
    small = ShardCache(cache.root, 2 * SIZE, HURRIED)
    maps = [held(small, store, target, number) for number in (0, 1)]
    with pytest.raises(NoRoom):
        small.fetch(store, target, shard(2))
    assert there(target) == {0, 1}
    with small.hold(store, target, shard(2), let_go=lambda: maps.pop(0).close()) as file:
        assert file.read() == content_of(2)
    assert there(target) == {1, 2}


def test_a_cache_that_others_fill_is_an_error_in_the_end(
    cache: ShardCache, target: Path, serve: Serve
) -> None:
    store = at(serve(in_order()))
    small = ShardCache(cache.root, SIZE, RetryPolicy(0.1, 0.002, 0.01))
    other = held(small, store, target, 0)
    with pytest.raises(UserError, match=r"all 0\.0003 GB are in use"):
        small.hold(store, target, shard(1))
    other.close()
    with pytest.raises(UserError, match=r"train-000001.tar alone has 0\.0003 GB"):
        ShardCache(cache.root, SIZE - 1, HURRIED).hold(store, target, shard(1))


def test_room_is_kept_for_what_is_on_its_way(cache: ShardCache, target: Path, serve: Serve) -> None:
    server = serve(lambda name, attempt: "silent" if name == shard(0).name else "")
    small = ShardCache(cache.root, 2 * SIZE, HURRIED)
    fetcher = fetch_in_child(small, at(server), target, 0)
    while not server.requests:
        time.sleep(0.01)
    for number in (1, 2, 3):
        small.fetch(at(server), target, shard(number))
        assert there(target) == {number}
    os.kill(fetcher, 9)
    os.waitpid(fetcher, 0)
    small.fetch(at(server), target, shard(4))
    assert there(target) == {3, 4}


def test_room_is_made_for_a_shard_of_unknown_size_as_it_grows(
    cache: ShardCache, target: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moco_scale.data.remote.http_store.CHUNK", SIZE // 20)
    small, store = ShardCache(cache.root, 5 * SIZE // 2, HURRIED), at(serve(lambda *_: ""))
    unknown = RemoteFile(shard(3).name, most=small.limit)
    for number in (1, 2):
        small.fetch(store, target, shard(number))
    path = shard_path(target, shard(1))
    with pytest.raises(NoRoom):
        small.fetch(store, target, unknown, keep={path, shard_path(target, shard(2))})
    assert there(target) == {1, 2}
    small.fetch(store, target, unknown, keep={path})
    assert there(target) == {1, 3}


def test_a_name_stays_a_name_in_the_folder_whatever_it_is(tmp_path: Path) -> None:
    names = ["a/b.tar", ".a.tar", "ü" * 127, "x" * 255, "x" * 254 + "y", "/".join("ab" * 99), ".."]
    files = [RemoteFile(name, version=v) for name in names for v in ("", "../x", "/y", "0" * 12)]
    paths = [shard_path(tmp_path, file) for file in files]
    assert len(set(paths)) == len(paths)
    for path in paths:
        assert path.parent == tmp_path / SHARDS and not path.name.startswith(".")
        path.parent.mkdir(exist_ok=True)
        path.with_name(f".{path.name}.{2**50}.partial").touch()


def test_threads_fetch_beside_each_other(cache: ShardCache, target: Path, serve: Serve) -> None:
    store = at(serve(in_order("drop 1000")))
    small = ShardCache(cache.root, 4 * SIZE, HURRIED)
    wrong: list[int] = []

    def work(first: int) -> None:
        for number in [(first + i) % 6 for i in range(12)]:
            with small.hold(store, target, shard(number)) as file:
                if file.read() != content_of(number):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(there(target)) <= 4


def fail_writes(monkeypatch: pytest.MonkeyPatch, disk: int, root: Path) -> None:
    """A disk of so many bytes."""
    write_some = shard_cache._Sink._write_some

    def write(sink: shard_cache._Sink, data: memoryview) -> int:
        used = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
        if used >= disk:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_some(sink, data[: disk - used])

    monkeypatch.setattr(shard_cache._Sink, "_write_some", write)


def test_on_a_full_disk_old_shards_make_way(
    cache: ShardCache, target: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_writes(monkeypatch, 2 * SIZE + SIZE // 2, cache.root)
    store = at(serve(in_order()))
    for number in range(5):
        with cache.hold(store, target, shard(number)) as file:
            assert file.read() == content_of(number)
    assert there(target) == {3, 4}


def test_a_full_disk_without_anything_to_remove_is_an_error(
    cache: ShardCache, target: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_writes(monkeypatch, SIZE + SIZE // 2, cache.root)
    store = at(serve(in_order()))
    mapped = held(cache, store, target, 0)
    with pytest.raises(UserError, match=f"{cache.root}: the disk is full"):
        cache.hold(store, target, shard(1))
    assert [path.name for path in (target / "shards").iterdir()] == [shard(0).name]
    assert mapped[:] == content_of(0)


def test_locks_are_taken_as_a_network_file_system_wants_them(
    cache: ShardCache, target: Path, serve: Serve, locks_of_nfs: None
) -> None:
    store = at(serve(in_order()))
    small = ShardCache(cache.root, 2 * SIZE, HURRIED)
    mapped = held(small, store, target, 0)
    for number in (1, 2, 3):
        small.fetch(store, target, shard(number))
    assert there(target) == {0, 3}
    (target / "shards" / f".{shard(5).name}.{SIZE}.partial").touch()  # somebody was killed
    small.fetch(store, target, shard(4))
    assert there(target) == {0, 4} and mapped[:] == content_of(0)


@pytest.mark.parametrize("reason", [errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_folder_without_locks_is_an_error(
    cache: ShardCache, target: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    def flock(*_: object) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match=r"--shard-cache .* no locks .* local disk of each node"):
        cache.hold(at(serve(in_order())), target, shard(0))


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path, serve: Serve) -> None:
    (tmp_path / "file").touch()
    cache = ShardCache(tmp_path / "file", SIZE, HURRIED)
    with pytest.raises(UserError, match="cannot be used: Not a directory"):
        cache.hold(at(serve(in_order())), cache.home / "set", shard(0))


def test_a_shard_that_was_cut_short_on_the_disk_is_fetched_again(
    cache: ShardCache, target: Path, serve: Serve
) -> None:
    store = at(serve(in_order()))
    cache.fetch(store, target, shard(0))
    os.truncate(target / "shards" / shard(0).name, 10)
    with cache.hold(store, target, shard(0)) as file:
        assert file.read() == content_of(0)

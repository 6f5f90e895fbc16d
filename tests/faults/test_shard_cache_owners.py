"""A shard cache in a folder that others use or own: nothing of theirs is touched."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cached_shards import (
    HURRIED,
    SIZE,
    Serve,
    at,
    content_of,
    in_order,
    serving,
    shard,
    there,
)

from moco_scale.data.remote import shard_cache
from moco_scale.data.remote.download import RemoteFile
from moco_scale.data.remote.shard_cache import ShardCache
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


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, links not followed, with its content."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_what_the_user_keeps_in_the_folder_is_neither_counted_nor_removed(
    cache: ShardCache, target: Path, serve: Serve
) -> None:
    """Tars in folders of its layout, partial names that are not its own, and a set without marker
    in its own part; three times what the limit allows."""
    users = [cache.root / "laion" / "shards", cache.home / "copied" / "shards"]
    cache.make(target)
    users += [target / "shards" / "of the user's"]
    names = ("000.tar", ".x.partial", "x.partial", ".x.12y.partial", ".x.-1.partial")
    for folder in users:
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).write_bytes(b"x" * SIZE)
    before = {folder: tree(folder) for folder in users}
    small, store = ShardCache(cache.root, 2 * SIZE, HURRIED), at(serve(in_order()))
    for number in range(4):
        small.hold(store, target, shard(number)).close()
    assert there(target) == {2, 3}
    assert {folder: tree(folder) for folder in users} == before


def test_links_in_the_cache_are_not_followed(
    cache: ShardCache, target: Path, serve: Serve, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    (mine / "shards").mkdir(parents=True)
    (mine / "shards" / "thesis").write_bytes(b"x" * SIZE)
    (mine / shard_cache.MARKER).touch()
    before = tree(mine)
    cache.make(target)
    (cache.home / "link").symlink_to(mine)
    (cache.home / "other").mkdir()
    (cache.home / "other" / shard_cache.MARKER).touch()
    (cache.home / "other" / "shards").symlink_to(mine / "shards")
    # One in the place of a shard is of another size, or of the right one.
    (target / "shards" / shard(0).name).symlink_to(mine / "shards" / "thesis")
    (target / "shards" / "linked").symlink_to(mine / "shards" / "thesis")
    small, store = ShardCache(cache.root, SIZE, HURRIED), at(serve(in_order()))
    for number in range(3):
        with small.hold(store, target, shard(number)) as file:
            assert file.read() == content_of(number)
    assert tree(mine) == before


@pytest.mark.parametrize("what", ["link", "file", "another user's", "no marker"])
def test_a_stranger_in_the_place_of_the_cache_is_refused(
    cache: ShardCache, target: Path, serve: Serve, tmp_path: Path, what: str
) -> None:
    mine = tmp_path / "mine"
    (mine / "set" / "shards").mkdir(parents=True)
    (mine / "set" / "shards" / "000.tar").write_bytes(b"x" * SIZE)
    cache.root.mkdir()
    if what == "link":
        cache.home.symlink_to(mine)
    elif what == "file":
        cache.home.write_text("mine")
    elif what == "no marker":
        mine.rename(cache.home)
        mine = cache.home
    else:
        if os.geteuid():
            pytest.skip("to make another user's folder takes root")
        cache.make(target)
        os.chown(cache.home, 12345, 12345)
    before = tree(mine), tree(cache.root)
    with pytest.raises(UserError, match=rf"--shard-cache .*{cache.home.name}.*choose another"):
        cache.hold(at(serve(in_order())), target, shard(0))
    assert (tree(mine), tree(cache.root)) == before


def test_where_all_files_have_one_owner_the_folder_is_ours(
    cache: ShardCache, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root's on NFS, or a share mounted for one user."""
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    target = cache.home / "set"
    for number in (0, 1):
        cache.hold(at(serve(in_order())), target, shard(number)).close()
    assert there(target) == {0, 1}
    assert not list(cache.home.glob(".owner*"))


def test_users_of_one_folder_have_a_part_each(
    cache: ShardCache, target: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, small = at(serve(in_order())), ShardCache(cache.root, SIZE, HURRIED)
    small.fetch(store, target, shard(0))
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    other = small.home / "set"
    small.fetch(store, other, shard(1))
    small.fetch(store, other, shard(2))
    assert other != target and there(other) == {2} and there(target) == {0}


def test_a_cache_of_an_earlier_version_is_said_once_and_left_alone(
    cache: ShardCache, serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = cache.root / "data-0123456789abcdef" / "shards"
    earlier.mkdir(parents=True)
    (earlier / "000.tar").write_bytes(b"x" * 2 * SIZE)
    store, small = at(serve(in_order())), ShardCache(cache.root, SIZE, HURRIED)
    for name in ("one", "two"):
        small.fetch(store, small.home / name, shard(0))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and str(earlier.parent) in lines[0] and "earlier version" in lines[0]
    assert (earlier / "000.tar").exists()


def test_users_of_one_cache_home_have_a_part_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOCO_SCALE_CACHE", str(tmp_path))
    assert shard_cache.cache_home() == tmp_path
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    assert shard_cache.cache_home() == tmp_path / f"user-{uid + 1}"
    monkeypatch.setenv("MOCO_SCALE_CACHE", str(tmp_path / "to be made"))
    assert shard_cache.cache_home() == tmp_path / "to be made"


@pytest.mark.parametrize("umask", [0o077, 0o022, 0o002])
def test_nothing_is_more_open_than_the_umask_allows(
    cache: ShardCache, target: Path, serve: Serve, umask: int
) -> None:
    small, before = ShardCache(cache.root, SIZE, HURRIED), os.umask(umask)
    try:
        small.fetch(at(serve(in_order())), target, shard(0))
        small.fetch(at(serve(in_order())), target, shard(1))  # which takes the lock to make room
        shard_cache.write_once(target / "index.json", b"{}")
    finally:
        os.umask(before)
    for path in [cache.root, *cache.root.rglob("*")]:
        assert path.stat().st_mode & umask == 0, path


@pytest.mark.parametrize(
    "name", ["..", ".", ".hidden.tar", "a/../../b.tar", ".x.5.partial", "x.5.partial"]
)
def test_every_name_becomes_one_file_in_the_folder_of_its_set(tmp_path: Path, name: str) -> None:
    for version in ("", "1f", "/../../up"):
        path = shard_cache.shard_path(tmp_path, RemoteFile(name, SIZE, version=version))
        assert path.parent == tmp_path / "shards"
        assert not path.name.startswith(".")

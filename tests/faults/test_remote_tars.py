"""Tars elsewhere that have no index: fetched once to make it, whatever interrupts that."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from http_folder import FaultyFolder, served
from remote_sets import HURRIED, batches, same

from moco_scale.__main__ import main
from moco_scale.data.open import data_set, open_shards
from moco_scale.data.remote import shard_source
from moco_scale.data.remote.shard_source import ShardSource
from moco_scale.data.remote.store import FileState
from moco_scale.data.shards import remote_tars
from moco_scale.data.shards.protocols import Shards
from moco_scale.data.shards.saved_scans import SavedScan, load_scan, save_scan, scan_path
from moco_scale.data.shards.tar_scan import ShardScan
from moco_scale.utils.errors import UserError


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shard_source, "RetryPolicy", HURRIED)
    monkeypatch.setenv("MOCO_SCALE_CACHE", str(tmp_path / "home"))


def test_tars_without_an_index_are_fetched_once_to_make_it(
    tiny_shards: Path, tmp_path: Path
) -> None:
    near = open_shards(tiny_shards, "train")
    bad = ("drop 3000", "500", "")

    def fault(name: str, attempt: int) -> str:
        return "404" if name == "index.json" else bad[min(attempt, 2)]

    with served(tiny_shards, fault) as server:
        spec = f"{server.url}/train-{{000000,000001,000002,000003}}.tar?signed=secret"
        source = ShardSource(spec, str(tmp_path / "cache"))
        far = open_shards(source, "train")
        assert np.array_equal(far.labels, near.labels)
        same(batches(far, 1), batches(near, 0))
        same(batches(open_shards(source, "train"), 0), batches(near, 0))
        assert all(server.count(path.name) == 3 for path in tiny_shards.glob("train-*.tar"))
        assert "val" not in data_set(source).splits
        with pytest.raises(UserError, match="no split 'val'"):
            open_shards(source, "val")
        assert str(source) == spec.partition("?")[0]
        assert all(request.query == "signed=secret" for request in server.requests)
    broken = tmp_path / "broken"
    shutil.copytree(tiny_shards, broken)
    os.truncate(broken / "train-000001.tar", 5000)
    with (
        served(broken) as server,
        pytest.raises(UserError, match=rf"{server.url}/train-000001.tar.*trunc"),
    ):
        open_shards(f"{server.url}/train-{{000000..000003}}.tar", "train")


def test_samples_keep_their_keys_whatever_their_tars_are_called(
    tiny_shards: Path, tmp_path: Path
) -> None:
    near = open_shards(tiny_shards, "train")
    with served(tiny_shards) as server:
        spec = f"{server.url}/{{a b+c}}/train-{{000000..000003}}.tar"
        far = open_shards(ShardSource(spec, str(tmp_path / "cache")), "train")
        expected = [near.place(i) for i in range(len(near))]
        assert all(place.key for place in expected)
        expected = [place._replace(shard=f"a b+c/{place.shard}") for place in expected]
        assert [far.place(i) for i in range(len(far))] == expected
        far.read(0)
        for path in (tmp_path / "cache").rglob("*.tar"):
            path.unlink()
        assert far.place(0) == expected[0]  # what is mapped is still there


def opened(server: FaultyFolder, cache: Path, names: str = "000000..000003") -> Shards:
    return open_shards(ShardSource(f"{server.url}/train-{{{names}}}.tar", str(cache)), "train")


def again(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, nothing that was asked of the server lately is believed."""
    monkeypatch.setattr(remote_tars, "_FRESH", -1.0)


def test_who_was_interrupted_fetches_only_the_others(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_tars, "_FETCHERS", 1)
    broken = ["train-000002.tar"]
    with served(tiny_shards, lambda name, _: "403" if name in broken else "") as server:
        with pytest.raises(UserError, match=r"train-000002\.tar: HTTP 403"):
            opened(server, tmp_path / "cache")
        shutil.rmtree(tmp_path / "cache")  # it may hold less than all
        broken.clear()
        far = opened(server, tmp_path / "other")
        assert [server.count(f"train-00000{i}.tar") for i in range(3)] == [1, 1, 2]
        near = open_shards(tiny_shards, "train")
        assert far.fingerprint == near.fingerprint
        same(batches(far, 0), batches(near, 0))


def test_a_run_names_the_command_that_makes_a_large_index(
    tiny_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    again(monkeypatch)
    for limit, value in (("_FEW", 3), ("_LITTLE", 10_000)):
        with monkeypatch.context() as patch, served(tiny_shards) as server:
            patch.setattr(remote_tars, limit, value)
            cache = tmp_path / f"cache {limit}"
            with pytest.raises(UserError, match=r"4 of 4 tars \(0\.\d+ GB\) have to be") as caught:
                opened(server, cache)
            assert all(request.probe for request in server.requests)
            command = shlex.split(str(caught.value).partition("moco_scale ")[2])
            assert command == ["shard", "--index", *command[2:3], "--shard-cache", str(cache)]
            main(command)
            assert f"{command[2]} has its index (splits: train)" in capsys.readouterr().out
            near = open_shards(tiny_shards, "train")
            same(batches(opened(server, cache), 0), batches(near, 0))
            assert all(server.count(path.name) == 1 for path in tiny_shards.glob("train-*.tar"))


def test_a_tar_that_is_not_there_is_noticed_before_any_is_fetched(
    tiny_shards: Path, tmp_path: Path
) -> None:
    with served(tiny_shards) as server:
        with pytest.raises(UserError, match=r"train-000004\.tar: HTTP 404.*no such tar.*braces"):
            opened(server, tmp_path, "000000..000004")
        assert all(request.probe for request in server.requests)


def test_an_empty_tar_is_named(tiny_shards: Path, tmp_path: Path) -> None:
    moving = shutil.copytree(tiny_shards, tmp_path / "moving")
    os.truncate(moving / "train-000001.tar", 0)
    with served(moving) as server, pytest.raises(UserError, match=r"000001\.tar: it is empty: 0"):
        opened(server, tmp_path / "cache")


def test_tars_that_were_replaced_are_indexed_again(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moving = shutil.copytree(tiny_shards, tmp_path / "moving")
    with served(moving) as server:
        first = opened(server, tmp_path / "cache")
        again(monkeypatch)
        assert opened(server, tmp_path / "cache").fingerprint == first.fingerprint
        assert len(server.requests) == 3 * 4  # each tar once, and twice what it is now
        shutil.copy(moving / "train-000000.tar", moving / "train-000001.tar")
        second = opened(server, tmp_path / "cache")
        assert [server.count(f"train-00000{i}.tar") for i in range(4)] == [1, 2, 1, 1]
        assert second.fingerprint != first.fingerprint
        assert bytes(second.read(8)) == bytes(second.read(0)) == bytes(first.read(0))
        # Its own tar is still in the cache, whatever lies there now.
        old = open_shards(tiny_shards, "train")
        assert [bytes(first.read(i)) for i in range(32)] == [bytes(old.read(i)) for i in range(32)]
        shutil.rmtree(tmp_path / "cache")
        first.rest()
        with pytest.raises(UserError, match=r"train-000001\.tar.*replaced.*start again") as caught:
            first.read(8)
        told = Path(str(caught.value).rpartition("remove ")[2].removesuffix(" first"))
        assert told.is_file()


def test_servers_may_disagree_about_tags_or_say_nothing(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again(monkeypatch)
    with served(tiny_shards) as server:
        server.tag = lambda path: None
        opened(server, tmp_path / "cache")
        opened(server, tmp_path / "cache")
        assert [server.count(f"train-00000{i}.tar") for i in range(4)] == [1] * 4
    size, tag, time = 5, '"a"', "Mon"
    said = FileState(size, tag, time)
    assert said.same(FileState(size, '"b"', time)) and said.same(FileState(size, tag, "Tue"))
    assert said.same(FileState(size)) and not said.same(FileState(size, '"b"'))
    assert not said.same(FileState(size, '"b"', "Tue")) and not said.same(FileState(6, tag, time))


def test_one_tar_is_a_set_too(tiny_shards: Path, tmp_path: Path) -> None:
    with served(tiny_shards) as server:
        source = ShardSource(f"{server.url}/train-000002.tar?signed=x", str(tmp_path / "cache"))
        far, near = open_shards(source, "train"), open_shards(tiny_shards, "train")
        assert [bytes(far.read(i)) for i in range(len(far))] == [
            bytes(near.read(i)) for i in range(16, 24)
        ]


def test_a_saved_scan_is_read_again_unless_it_is_damaged(tmp_path: Path) -> None:
    scan = ShardScan(
        np.array([512, 4096], np.uint64),
        np.array([9, 8], np.uint32),
        np.array([0, -1]),
        ["ä"],
        3,
        "1.json, which is not JSON",
        "x_1.5.jpg",
        "2.mask.png",
    )
    saved = SavedScan(scan, 10240, "ab" * 16, FileState(10240, '"x"'))
    path = scan_path(tmp_path, "https://h/x.tar")
    save_scan(path, saved)
    found = load_scan(path)
    assert found is not None and found[1:] == saved[1:] and found.scan[3:] == scan[3:]
    for field in ("offset", "size", "label"):
        one, other = getattr(found.scan, field), getattr(scan, field)
        assert np.array_equal(one, other) and one.dtype == other.dtype
    assert load_scan(scan_path(tmp_path, "https://h/y.tar")) is None
    content = path.read_bytes()
    for damaged in (b"", content[:200], content[:300] + b"x" + content[301:], b"{}"):
        path.write_bytes(damaged)
        assert load_scan(path) is None

"""Data sets that lie elsewhere: the same run as from a folder, whatever the network does."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import pytest
import torch
from commands import TINY, forked
from http_folder import served
from remote_sets import AUG, HURRIED, WINDOW, batches, same, source_of

from moco_scale.config.command_line import parse
from moco_scale.config.schema import differences
from moco_scale.data.loading.loader import ViewBatch, evaluation_loader, pretraining_loader
from moco_scale.data.loading.workers import BatchLoader
from moco_scale.data.open import data_set, open_shards
from moco_scale.data.remote import fsspec_store, prefetch, shard_source
from moco_scale.data.remote.download import RemoteFile
from moco_scale.data.remote.prefetch import (
    NOWHERE,
    FetchAhead,
    Job,
    Lookahead,
    RemotePart,
    check_room,
)
from moco_scale.data.remote.shard_cache import GB, SHARDS, ShardCache
from moco_scale.data.remote.shard_source import ShardSource
from moco_scale.data.sampling.order import BatchPlan, Slices
from moco_scale.data.sampling.windows import WindowedPermutation
from moco_scale.utils.errors import UserError


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_source, "RetryPolicy", HURRIED)


def test_images_labels_and_identity_are_those_of_the_folder(
    tiny_shards: Path, tmp_path: Path
) -> None:
    with served(tiny_shards) as server:
        source = source_of(server, tmp_path)
        assert "val" in data_set(source).splits and "test" not in data_set(source).splits
        for split in ("train", "val"):
            here, there = open_shards(tiny_shards, split), open_shards(source, split)
            assert there.fingerprint == here.fingerprint and there.classes == here.classes
            assert np.array_equal(there.labels, here.labels)
            copied = pickle.loads(pickle.dumps(there.subset(np.arange(len(here))[::-2])))
            expected = [bytes(here.read(i)) for i in range(len(here))]
            assert [bytes(there.read(i)) for i in range(len(here))] == expected
            assert [bytes(copied.read(i)) for i in range(len(copied))] == expected[::-2]
            assert there.where(3) == here.where(3)
            shard = f"{server.url}/{there.place(3).shard}"
            assert f"replace {shard}, and the index" in there.remedy(3)
            assert there.checkable() == [] and here.checkable() == [str(tiny_shards)]
        assert str(there.name) == server.url
        # Opened again, only what may have changed is asked for.
        before = len(server.requests)
        open_shards(source, "train")
        assert [request.name for request in server.requests[before:]] == ["index.json"]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_bad_network_changes_no_batch(tiny_shards: Path, tmp_path: Path, workers: int) -> None:
    faults = ("drop 3000", "500", "wrong", "short 1000", "drop 0", "")

    def fault(name: str, attempt: int) -> str:
        return faults[(attempt + len(name) + int(name[6:12])) % 6] if name[-4:] == ".tar" else ""

    local = batches(open_shards(tiny_shards, "train"), 0)
    with served(tiny_shards, fault) as server:
        shards = open_shards(source_of(server, tmp_path), "train")
        same(batches(shards, workers), local)
        # The next run finds them in the cache, from any step on.
        before = len(server.requests)
        same(batches(shards, workers, start=5), local[5:])
        assert len(server.requests) == before


def test_a_cache_that_holds_little_more_than_the_window_will_do(
    tiny_shards: Path, tmp_path: Path
) -> None:
    sizes = [path.stat().st_size for path in sorted(tiny_shards.glob("train-*.tar"))]
    local = batches(open_shards(tiny_shards, "train"), 0, steps=12)
    with served(tiny_shards) as server:
        exact = open_shards(source_of(server, tmp_path, sum(sizes) / GB), "train")
        same(batches(exact, 0, steps=12), local)
        with pytest.raises(UserError, match=r"too small .* takes 0\.\d+ GB at least") as caught:
            batches(open_shards(source_of(server, tmp_path, max(sizes) / GB), "train"), 0)
        smallest = float(str(caught.value).split("takes ")[1].split(" GB")[0])
        small = open_shards(source_of(server, tmp_path / "small", smallest), "train")
        same(batches(small, 2, steps=12), local)
        for folder in (tmp_path / "small").glob(f"*/{SHARDS}"):
            assert sum(path.stat().st_size for path in folder.iterdir()) <= smallest * GB


@pytest.mark.parametrize("workers", [0, 2])
def test_what_stays_broken_ends_the_run_with_its_name(
    tiny_shards: Path, tmp_path: Path, workers: int
) -> None:
    with served(tiny_shards, lambda name, _: "403" if name == "train-000002.tar" else "") as server:
        shards = open_shards(source_of(server, tmp_path), "train")
        with pytest.raises(UserError, match=rf"{server.url}/train-000002.tar: HTTP 403"):
            batches(shards, workers)


def test_a_loader_that_is_closed_does_not_wait_for_a_silent_server(
    tiny_shards: Path, tmp_path: Path
) -> None:
    """The workers would wait a minute for the first byte, the test is over long before."""
    others = set(psutil.Process().children())
    with served(tiny_shards, lambda name, _: "drop 0" if name[-4:] == ".tar" else "") as server:
        shards = open_shards(source_of(server, tmp_path), "train")
        plan = BatchPlan(shards.order(3, WINDOW), 8)
        with pretraining_loader(shards, plan, AUG, 16, num_workers=2, end_step=8) as loader:
            loader._batches = iter(loader._loader)
            while not any(request.name.endswith(".tar") for request in server.requests):
                time.sleep(0.01)
        started = set(psutil.Process().children()) - others
        assert not [p for p in started if "resource" not in " ".join(p.cmdline())]


def test_evaluation_reads_them_in_order(tiny_shards: Path, tmp_path: Path) -> None:
    with served(tiny_shards) as server:
        far = open_shards(source_of(server, tmp_path / "cache"), "val")
        near = open_shards(tiny_shards, "val")
        for shards in (far, near):
            loader = evaluation_loader(shards, 16, 1.0, batch_size=3, num_workers=1)
            with loader:
                if shards is far:
                    read = list(loader)
                else:
                    same(read, list(loader))


def test_evaluation_fetches_ahead_for_all_ranks_of_a_machine(
    tiny_shards: Path, tmp_path: Path
) -> None:
    with served(tiny_shards) as server:
        far = open_shards(source_of(server, tmp_path), "train")
        [part] = far.remote_parts()

        def loader(rank: int, *fetches_for: int) -> BatchLoader[ViewBatch]:
            size: dict[str, Any] = {"batch_size": 4, "rank": rank, "world": 4, "num_workers": 0}
            return evaluation_loader(far, 16, 1.0, **size, fetches_for=fetches_for)

        with loader(1, 1, 3) as own, loader(3) as other:
            deadline = time.monotonic() + 60
            while [part.cache.has(part.folder, file) for file in part.files] != [0, 1, 0, 1]:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            before = len(server.requests)
            read = [i for each in (own, other) for batch in each for i in batch.index.tolist()]
        assert read == [*range(8, 16), *range(24, 32)]
        assert len(server.requests) == before
    assert Slices((range(5), range(7, 9)), 2).batch(1).index.tolist() == [2, 3]
    assert len(Slices((range(5), range(7, 9)), 2)) == 3


def test_who_reads_beside_a_run_holds_few_shards_ready(tmp_path: Path) -> None:
    shard_of = np.repeat(np.arange(40, dtype=np.uint32), 8)
    files = [RemoteFile(f"{n}.tar", 100) for n in range(40)]
    store, cache = fsspec_store.store_at("http://host"), ShardCache(tmp_path, 10**6)
    part = RemotePart(0, shard_of, files, store, tmp_path, cache)
    slices = Slices((range(160), range(160, 320)), 8)
    lookahead = Lookahead(Job([part], slices, 0, len(slices), in_flight=1, spare=3))
    lookahead.advance(0)
    assert lookahead.wanted() == [(0, n) for n in (0, 20, 1, 21, 2, 22)]
    lookahead.advance(19)
    assert lookahead.wanted()[-1] == (0, 39)


@pytest.mark.parametrize("name", ["index.json", "train-index.npy"])
def test_an_index_that_arrives_damaged_is_fetched_again(
    tiny_shards: Path, tmp_path: Path, name: str
) -> None:
    with served(tiny_shards, lambda n, a: "wrong" if (n, a) == (name, 0) else "") as server:
        far = open_shards(source_of(server, tmp_path / "cache"), "train")
        assert far.fingerprint == open_shards(tiny_shards, "train").fingerprint
        assert server.count(name) == 2
    shutil.copytree(tiny_shards, tmp_path / "damaged")
    content = (tmp_path / "damaged" / name).read_bytes()
    (tmp_path / "damaged" / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with (
        served(tmp_path / "damaged") as server,
        pytest.raises(UserError, match=rf"{server.url}/{name}.*damaged.*fetched 3 times"),
    ):
        open_shards(source_of(server, tmp_path / "other"), "train")


def test_shards_without_checksums_are_read(tiny_shards: Path, tmp_path: Path) -> None:
    older = tmp_path / "older"
    shutil.copytree(tiny_shards, older)
    header = json.loads((older / "index.json").read_text())
    for entry in header["splits"].values():
        for shard in entry["shards"]:
            assert len(shard.pop("checksum")) == 32
    (older / "index.json").write_text(json.dumps(header))
    with served(older) as server:
        far = open_shards(source_of(server, tmp_path / "cache"), "train")
        same(batches(far, 0), batches(open_shards(tiny_shards, "train"), 0))


def test_a_set_that_was_made_again_is_another_one_in_the_cache(
    tiny_shards: Path, tmp_path: Path
) -> None:
    moving = tmp_path / "moving"
    shutil.copytree(tiny_shards, moving)
    with served(moving) as server:
        source = source_of(server, tmp_path / "cache")
        old = bytes(open_shards(source, "train").read(0))
        header = json.loads((moving / "index.json").read_text())
        entry = header["splits"]["train"]["shards"]
        first, second = (moving / entry[i]["name"] for i in (0, 1))
        content = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)
        rows = np.load(moving / "train-index.npy")
        from moco_scale.data.shards.index_file import rows_checksum

        rows["shard"] = np.where(rows["shard"] < 2, 1 - rows["shard"].astype(int), rows["shard"])
        rows = rows[np.argsort(rows["shard"], kind="stable")]
        np.save(moving / "train-index.npy", rows)
        header["splits"]["train"]["checksum"] = rows_checksum(rows)
        for key in ("bytes", "samples", "checksum"):
            entry[0][key], entry[1][key] = entry[1][key], entry[0][key]
        (moving / "index.json").write_text(json.dumps(header))
        again = open_shards(source, "train")
        assert bytes(again.read(8)) == old
        assert again.where(8).startswith(entry[1]["name"])


def test_an_object_store(tiny_shards: Path, tmp_path: Path) -> None:
    """In the memory of this process, which workers inherit and the one that fetches ahead does not.
    Like those of real stores its connections must not be used after a fork."""
    fsspec = pytest.importorskip("fsspec")
    from fsspec.implementations.memory import MemoryFileSystem

    class Pinned(MemoryFileSystem):  # type: ignore[misc]
        protocol = "pinned"
        cachable = False

        def __init__(self) -> None:
            super().__init__()
            self.process = os.getpid()

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return super()._strip_protocol(path.replace("pinned://", "memory://"))

        def _open(self, *arguments: object, **keywords: object) -> object:
            if self.process != os.getpid():
                raise RuntimeError("This class is not fork-safe")
            return super()._open(*arguments, **keywords)

    fsspec.register_implementation("pinned", Pinned, clobber=True)
    store = fsspec.filesystem("memory")
    for path in filter(Path.is_file, tiny_shards.iterdir()):
        store.pipe(f"/bucket/set/{path.name}", path.read_bytes())
    try:
        far = open_shards(ShardSource("pinned://bucket/set", str(tmp_path)), "train")
        same(batches(far, 1), batches(open_shards(tiny_shards, "train"), 0))
        far = open_shards(ShardSource(f"file://{tiny_shards}", str(tmp_path)), "train")
        same(batches(far, 1), batches(open_shards(tiny_shards, "train"), 0))
        store.rm("/bucket/set/train-000000.tar")
        shutil.rmtree(tmp_path)
        with pytest.raises(UserError, match=r"train-000000.tar.*FileNotFoundError"):
            batches(open_shards(ShardSource("memory://bucket/set", str(tmp_path)), "train"), 0)
    finally:
        store.rm("/bucket", recursive=True)


def test_near_and_far_sets_are_mixed(tiny_shards: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_shards, tmp_path / "copy")
    near = open_shards(f"{tiny_shards}:0.25,{tmp_path / 'copy'}:0.75", "train")
    with served(tiny_shards) as server:
        spec = f"{tiny_shards}:0.25,{server.url}:0.75"
        far = open_shards(ShardSource(spec, str(tmp_path / "cache")), "train")
        assert far.fingerprint == near.fingerprint
        same(batches(far, 2, steps=20), batches(near, 0, steps=20))
        subset = far.subset(np.arange(10, 60, 3))
        [part] = subset.remote_parts()
        for i, shard in enumerate(part.shard_of.tolist()):
            name = part.files[shard].name if shard != NOWHERE else None
            assert (name is not None) == (10 + 3 * i >= 32)
            assert name is None or f"{server.url}, {name}" in subset.where(i)


def test_it_looks_ahead_in_the_order_of_need_as_far_as_there_is_room(tmp_path: Path) -> None:
    shard_of = np.repeat(np.arange(40, dtype=np.uint32), 8)
    files = [RemoteFile(f"{n}.tar", 100 + n % 3) for n in range(40)]
    plan = BatchPlan(WindowedPermutation(shard_of, 4, seed=0), 8)

    def job(limit: int) -> Job:
        cache = ShardCache(tmp_path, limit)
        part = RemotePart(0, shard_of, files, fsspec_store.store_at("http://host"), tmp_path, cache)
        return Job([part], plan, 0, 80, in_flight=2)

    def needs(*steps: int) -> set[tuple[int, int]]:
        return {(0, int(s)) for step in steps for s in shard_of[plan.batch(step).index]}

    check_room(job(1000).parts, plan, 2)
    lookahead = Lookahead(job(1000))
    for step in range(80):
        lookahead.advance(step)
        wanted = lookahead.wanted()
        assert sum(files[s].bytes or 0 for _, s in wanted) <= 1000
        # What is read now, and what readers that lag behind still read.
        assert needs(*range(max(0, step - 2), step + 1)) <= set(wanted)
    everything = Lookahead(job(10**6))
    everything.advance(0)
    first_needs: dict[tuple[int, int], int] = {}
    for step in range(80):
        for shard in needs(step):
            first_needs.setdefault(shard, step)
    order = [first_needs[shard] for shard in everything.wanted()]
    assert len(order) == 40 and order == sorted(order)
    with pytest.raises(UserError, match="is too small"):
        check_room(job(699).parts, plan, 2)


@contextlib.contextmanager
def process_of(job: Job) -> Iterator[FetchAhead]:
    process = FetchAhead(job)
    try:
        yield process
    finally:
        process.close()


def test_shards_are_there_before_anybody_reads_and_the_process_goes(
    tiny_shards: Path, tmp_path: Path
) -> None:
    with served(tiny_shards, lambda n, a: "500" if n[-4:] == ".tar" and a == 0 else "") as server:
        shards = open_shards(source_of(server, tmp_path), "train")
        plan, parts = BatchPlan(shards.order(3, WINDOW), 8), shards.remote_parts()
        part = parts[0]
        with process_of(Job(parts, plan, 0, 12, in_flight=1)) as process:
            # What the whole group gets is not this process's affair, from its first moment on.
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
                process._process.send_signal(number)
            process.at(0)
            deadline = time.monotonic() + 60
            while not all(part.cache.has(part.folder, file) for file in part.files):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            assert process._process.poll() is None
        assert process._process.returncode == 0
        before = len(server.requests)
        same(batches(shards, 0), batches(open_shards(tiny_shards, "train"), 0))
        assert len(server.requests) == before


def test_where_no_process_can_be_started_the_limit_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = mock.Mock(side_effect=BlockingIOError(errno.EAGAIN, "Resource unavailable"))
    monkeypatch.setattr(prefetch.subprocess, "Popen", start)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with pytest.raises(UserError, match=r"cannot start another process: .*ulimit -u"):
        FetchAhead(mock.Mock())
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_a_process_that_was_killed_is_replaced(
    tiny_shards: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def kill(ahead: FetchAhead) -> int:
        pid = ahead._process.pid
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        return pid

    monkeypatch.setattr(prefetch, "_RESTARTS_APART", 3600.0)
    with served(tiny_shards) as server:
        shards = open_shards(source_of(server, tmp_path), "train")
        plan, parts = BatchPlan(shards.order(3, WINDOW), 8), shards.remote_parts()
        with process_of(Job(parts, plan, 0, 12, in_flight=1)) as process:
            killed = kill(process)
            process.at(0)
            assert process._process.pid != killed
            deadline = time.monotonic() + 60
            while not all(parts[0].cache.has(parts[0].folder, file) for file in parts[0].files):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            killed = kill(process)
            process.at(1)
            assert process._process.pid == killed  # not again at once
            monkeypatch.setattr(process, "_not_before", 0.0)
            process.at(2)
            assert process._process.pid != killed
    assert capfd.readouterr().err.count("fetches shards ahead died (SIGKILL") == 1


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_from_an_address_is_the_run_from_the_folder_in_the_same_windows(
    tiny_shards: Path, tmp_path: Path, ranks: int
) -> None:
    """With workers, through a bad network, stopped and gone on with in mid-epoch."""
    flags = (*TINY, "--shuffle-window", WINDOW, "--num-workers", "1", "--checkpoint-freq", "3")
    reference = forked(
        *flags, "--data-dir", tiny_shards, "--output-dir", tmp_path / "a", ranks=ranks
    )
    assert reference.status == 0, reference.output
    with served(tiny_shards, lambda n, a: ("drop 2000", "503", "")[min(a, 2)]) as server:
        flags = (*flags, "--data-dir", server.url, "--shard-cache", tmp_path / "cache")
        out = ("--output-dir", tmp_path / "b")
        first = forked(*flags, *out, "--max-steps", "3", ranks=ranks)
        assert first.status == 0, first.output
        second = forked(*flags, *out, ranks=ranks)
        assert second.status == 0, second.output
        for path in sorted(tiny_shards.glob("*.tar")):
            assert server.count(path.name) <= 3  # the faults, and once
    weights = [
        torch.load(tmp_path / run / "current.pth", weights_only=True)["model"] for run in "ab"
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["shuffle_window"] == WINDOW
    changed = parse([*map(str, flags[: len(TINY)]), "--data-dir", str(tiny_shards)])
    lines = differences(config, changed.defining())
    assert any(line.startswith("  --shuffle-window: 2 in the run") for line in lines)

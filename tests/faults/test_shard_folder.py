"""The folder that shards are written to: what stands in the way, and runs that are cut short."""

import contextlib
import errno
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

import pytest
from shard_runs import Command

from moco_scale.data.shards.indexed_shards import IndexedShards
from moco_scale.data.tools import output_folder, shard_file, writer


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path / "out" / "shards", capsys)


def test_an_existing_folder_is_refused_and_replaced_on_request(
    command: Command, image_folder: Path, tmp_path: Path
) -> None:
    assert command(image_folder) == 0
    assert "--overwrite" in command.refused(image_folder)
    before = IndexedShards.open(command.out).fingerprint
    # a failing run with --overwrite leaves the old shards
    (tmp_path / "x.tar").write_bytes(b"no tar")
    command.refused(tmp_path / "x.tar", "--overwrite")
    assert command(image_folder, "--overwrite", "--seed", "1") == 0
    assert IndexedShards.open(command.out).fingerprint != before
    assert [p.name for p in command.out.parent.iterdir()] == [command.out.name]


def test_overwrite_deletes_nothing_but_shards(command: Command, image_folder: Path) -> None:
    command.out.mkdir(parents=True)
    assert command(image_folder) == 0  # an empty folder is as good as none
    (command.out / "thesis.tex").touch()
    assert "thesis.tex" in command.refused(image_folder, "--overwrite")
    shutil.rmtree(command.out)
    command.out.mkdir()
    (command.out / "thesis.tex").touch()
    assert "holds other things" in command.refused(image_folder, "--overwrite")
    shutil.rmtree(command.out)
    command.out.touch()
    assert "is no folder" in command.refused(image_folder, "--overwrite")


def test_a_place_that_cannot_be_written(command: Command, image_folder: Path) -> None:
    command.out.parent.parent.mkdir(exist_ok=True)
    command.out.parent.touch()  # a file where a folder is needed
    assert f"Cannot write to {command.out.parent}" in command.refused(image_folder)


def full_disk(*_: object) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_disk_that_fills_up(
    command: Command, image_folder: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    assert command(image_folder) == 0
    written = 0

    def write(sink: Any, data: bytes) -> int:
        nonlocal written
        written += len(data)
        if written > 20_000:
            full_disk()
        return original(sink, data)

    original = shard_file._Sink.write
    monkeypatch.setattr(shard_file._Sink, "write", write)
    message = command.refused(
        image_folder, "--overwrite", "--shard-size", "6", "--seed", "1", workers=workers
    )
    assert f"The disk is full: no room left in {command.out.parent}" in message


def test_a_disk_that_fills_up_at_the_index(
    command: Command, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_write", full_disk)
    assert "The disk is full" in command.refused(image_folder)


def test_room_is_looked_for_before_anything_is_written(
    command: Command, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=30_000))
    message = command.refused(image_folder)
    assert "and" in message and "has only 30.0 kB left" in message


def test_a_killed_worker(
    command: Command, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(image: Any) -> NoReturn:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    monkeypatch.setattr(shard_file, "source_bytes", die)
    assert "A worker process was killed" in command.refused(image_folder, workers=2)


class StuckRun(NamedTuple):
    """A run in another process that has written a part of its first shard and goes no further."""

    process: ForkProcess
    pipe: int  # at its end when no process of the run lives
    log: Path


@contextlib.contextmanager
def stuck_run(command: Command, source: Path, workers: int) -> Iterator[StuckRun]:
    read_end, write_end = os.pipe()
    log = command.out.parent.parent / "log.txt"

    def run() -> NoReturn:
        original, read = shard_file.source_bytes, []

        def stuck(image: Any) -> bytes:
            read.append(image)
            if len(read) == 5:
                os.write(write_end, b".")
                while True:
                    signal.pause()
            return original(image)

        shard_file.source_bytes = stuck
        os.close(read_end)
        with log.open("w") as sys.stdout, contextlib.redirect_stderr(sys.stdout):
            sys.exit(command(source, workers=workers))

    # Forked: starting a new interpreter would import torch once more, which takes seconds.
    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    os.close(write_end)
    try:
        assert os.read(read_end, 1) == b".", log.read_text()
        yield StuckRun(process, read_end, log)
    finally:
        process.kill()
        process.join()
        os.close(read_end)


def partial_folders(command: Command) -> list[Path]:
    found = command.out.parent.glob(f"{command.out.name}.partial-*")
    return [path for path in found if path.is_dir()]


def test_a_killed_run_leaves_nothing_that_looks_finished(
    command: Command, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with stuck_run(command, image_folder, workers=2) as run:
        assert "Another process is writing" in command.refused(image_folder)
        run.process.kill()
        while os.read(run.pipe, 100):  # until the last worker has ended
            pass
    assert not command.out.exists()
    (left,) = partial_folders(command)
    assert not (left / "index.json").exists()
    assert command(image_folder) == 0
    assert list(command.out.parent.glob("*.partial-*")) == []
    assert f"removed {left.name}" in capsys.readouterr().out
    assert len(IndexedShards.open(command.out)) == 24


def test_shards_are_written_to_a_network_s_file_system(
    command: Command, image_folder: Path, locks_of_nfs: None
) -> None:
    command.out.with_name("shards.partial-0123abcd").mkdir(parents=True)
    command.out.with_name("shards.partial-0123abcd.lock").touch()  # of a run that was killed
    assert command(image_folder) == 0
    assert list(command.out.parent.glob("*.partial-*")) == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_run_removes_what_it_wrote(
    command: Command, image_folder: Path, number: signal.Signals, status: int
) -> None:
    with stuck_run(command, image_folder, workers=1) as run:
        assert run.process.pid is not None
        os.kill(run.process.pid, number)
        run.process.join()
        assert run.process.exitcode == status
        assert "Traceback" not in run.log.read_text()
    assert command.around() == {}


def test_a_run_killed_while_replacing_gives_the_old_shards_back(
    command: Command, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(image_folder) == 0
    before = IndexedShards.open(command.out).fingerprint
    # the state between the two renames
    command.out.rename(command.out.with_name("shards.replaced-0123abcd"))
    command.out.with_name("shards.partial-0123abcd").mkdir()
    assert command(image_folder) == 2  # the folder is there again, and is not replaced unasked
    assert "--overwrite" in capsys.readouterr().err
    assert [p.name for p in command.out.parent.iterdir()] == [command.out.name]
    assert IndexedShards.open(command.out).fingerprint == before


def test_a_rename_that_fails_keeps_the_old_shards(
    command: Command, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(image_folder) == 0
    original = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if ".partial-" in self.name and target == command.out:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return original(self, target)

    monkeypatch.setattr(output_folder.Path, "rename", rename)
    assert "mount point" in command.refused(image_folder, "--overwrite", "--seed", "1")

"""Sources that are damaged and runs that are cut short: one clear error, and nothing half done."""

import contextlib
import errno
import io
import multiprocessing
import os
import shutil
import signal
import sys
import tarfile
from collections.abc import Iterator
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

import pytest
import webdataset  # noqa: F401  (so that processes forked here have it)
from conftest import write_picture

from moco_scale.__main__ import main
from moco_scale.data import output_folder, shard_file, shards
from moco_scale.data.index import IndexedShards


class Command:
    """Runs the shard command into one output folder."""

    def __init__(self, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.out = out
        self._capsys = capsys

    def __call__(self, source: Path, *options: str, workers: int = 1) -> int:
        arguments = ["--source", str(source), "--out", str(self.out), "--workers", str(workers)]
        return main(["shard", *arguments, *options])

    def refused(self, source: Path, *options: str, workers: int = 1) -> str:
        """The message of a run that must fail, and leave things as they were."""
        before = self.around()
        assert self(source, *options, workers=workers) == 2
        assert self.around() == before
        shown = self._capsys.readouterr().err
        assert shown.startswith("moco_scale: error: ")
        assert "Traceback" not in shown and "Exception" not in shown
        return shown

    def around(self) -> dict[str, bytes]:
        """All files in the output folder and its siblings, whose names begin alike."""
        return {
            str(path): path.read_bytes() if path.is_file() else b""
            for top in self.out.parent.glob(f"{self.out.name}*")
            for path in [top, *top.rglob("*")]
        }


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path / "out" / "shards", capsys)


def pack(folder: Path, tar: Path) -> bytes:
    """A tar of the folder, compressed if its name says so; returns its bytes."""
    with tarfile.open(tar, "w:gz" if tar.suffix == ".gz" else "w") as archive:
        archive.add(folder, "pictures")
    return tar.read_bytes()


def test_no_source(command: Command, tmp_path: Path) -> None:
    assert f"There is no source {tmp_path / 'nothing'}" in command.refused(tmp_path / "nothing")


def test_no_pictures(command: Command, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "The folder is empty" in command.refused(empty)
    (empty / "notes.txt").touch()
    assert "the folder holds notes.txt" in command.refused(empty)
    pack(empty, tmp_path / "none.tar")
    assert "none.tar holds no pictures" in command.refused(tmp_path / "none.tar")
    shutil.move(tmp_path / "none.tar", empty)
    assert f"--source {empty / 'none.tar'}" in command.refused(empty)


@pytest.mark.parametrize("content", [b"", b"just a text", bytes(range(256)) * 40])
def test_not_a_tar(command: Command, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    assert "x.tar is not a tar" in command.refused(tmp_path / "x.tar")


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_a_tar_cut_anywhere(
    command: Command, picture_folder: Path, tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"x{suffix}"
    whole = pack(picture_folder, path)
    if suffix == ".tar":
        with tarfile.open(path) as tar:
            last = tar.getmembers()[-1]
        end = last.offset_data + -(-last.size // 512) * 512
        cuts = [
            512 * 3 + 100,
            512 * 9,
            len(whole) // 2,
            last.offset,
            last.offset + 100,
            end - 600,
            end,
        ]
    else:
        cuts = [20, len(whole) // 2, len(whole) - 4]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        assert "is truncated" in command.refused(path), f"cut at {cut} of {len(whole)}"


def test_a_damaged_header_in_the_middle_of_a_tar(
    command: Command, picture_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "x.tar"
    whole = bytearray(pack(picture_folder, path))
    with tarfile.open(path) as tar:
        middle = tar.getmembers()[20].offset
    whole[middle + 10] ^= 0xFF
    path.write_bytes(whole)
    assert f"damaged: neither a file nor the end mark at byte {middle}" in command.refused(path)


def test_a_damaged_gzip(command: Command, picture_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.tar.gz"
    whole = bytearray(pack(picture_folder, path))
    whole[len(whole) // 2] ^= 0xFF
    path.write_bytes(whole)
    assert "is truncated or damaged" in command.refused(path)


def test_a_truncated_tar_in_a_tar(command: Command, picture_folder: Path, tmp_path: Path) -> None:
    inner = pack(picture_folder / "train" / "ash", tmp_path / "ash.tar")
    for cut in (len(inner) // 2, 20 * 512):
        with tarfile.open(tmp_path / "x.tar", "w") as archive:
            for name in ("n00000001.tar", "n00000002.tar"):
                member = tarfile.TarInfo(name)
                data = inner[:cut] if name == "n00000001.tar" else inner
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        assert "n00000001.tar in " in command.refused(tmp_path / "x.tar")


def test_links_in_a_tar(command: Command, picture_folder: Path, tmp_path: Path) -> None:
    (picture_folder / "train" / "ash" / "link.jpg").symlink_to("000.jpg")
    pack(picture_folder, tmp_path / "x.tar")
    message = command.refused(tmp_path / "x.tar")
    assert "link.jpg -> 000.jpg" in message and "--dereference" in message


def test_the_same_name_twice(command: Command, picture_folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(picture_folder, "p")
        archive.add(picture_folder / "train" / "ash" / "001.jpg", "./p/train/ash/001.jpg")
    assert "p/train/ash/001.jpg twice" in command.refused(tmp_path / "x.tar")


def test_a_broken_link_and_an_unreadable_picture(command: Command, picture_folder: Path) -> None:
    link = picture_folder / "train" / "ash" / "link.jpg"
    link.symlink_to("nowhere.jpg")
    message = command.refused(picture_folder)
    assert f"Cannot read {link}: No such file or directory" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_source_without_permission(command: Command, picture_folder: Path) -> None:
    locked = picture_folder / "train" / "ash"
    locked.chmod(0)
    try:
        assert f"Cannot read {locked}: Permission denied" in command.refused(picture_folder)
    finally:
        locked.chmod(0o755)


def test_a_picture_that_vanishes(
    command: Command, picture_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = picture_folder / "val" / "ash" / "000.jpg"
    original = shards.random_order

    def order(*args: Any) -> Any:
        gone.unlink(missing_ok=True)
        return original(*args)

    monkeypatch.setattr(shards, "random_order", order)
    assert f"Cannot read {gone}" in command.refused(picture_folder, workers=2)


def test_only_empty_or_broken_pictures(command: Command, tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{i}.jpg").touch()
    assert "All 3 pictures of train are empty" in command.refused(tmp_path / "in")
    for i in range(3):
        (tmp_path / "in" / f"{i}.jpg").write_bytes(b"x")
    assert "None of the 3 train pictures" in command.refused(tmp_path / "in", "--verify")


def test_folders_that_say_nothing_clear(command: Command, picture_folder: Path) -> None:
    write_picture(picture_folder / "train" / "loose.jpg", seed=50)
    message = command.refused(picture_folder)
    assert "1 pictures lie in no class folder (the first: loose.jpg)" in message
    assert "--unlabelled" in message
    (picture_folder / "train" / "loose.jpg").unlink()
    (picture_folder / "val" / "ash").rename(picture_folder / "val" / "oak")
    message = command.refused(picture_folder)
    assert "4 pictures are of a class that no training picture has: oak" in message
    shutil.rmtree(picture_folder / "val")
    write_picture(picture_folder / "val" / "x.jpg", seed=51)
    message = command.refused(picture_folder)
    assert "--val-ground-truth" in message and "--train-only" in message
    shutil.rmtree(picture_folder / "train")
    write_picture(picture_folder / "test" / "x.jpg", seed=51)
    assert "no train folder" in command.refused(picture_folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("1\n2\n3\n4\n", "has 4 lines, and there are 12 validation pictures"),
        ("1\n" * 12, "mean nothing without meta.mat"),
        ("000.jpg ash\n", "says nothing about 001.jpg"),
        (
            "".join(f"{i:03d}.jpg oak\n" for i in range(12)),
            "that no training picture has: oak",
        ),
        ("".join(f"{i:03d}.jpg 3\n" for i in range(12)), "that no training picture has: 3"),
        ("a.jpg\nb.jpg ash\n", "line 1"),
    ],
)
def test_a_ground_truth_that_does_not_fit(
    command: Command, picture_folder: Path, tmp_path: Path, text: str, words: str
) -> None:
    flat = picture_folder / "val"
    shutil.rmtree(flat)
    for i in range(12):
        write_picture(flat / f"{i:03d}.jpg", seed=60 + i)
    (tmp_path / "truth.txt").write_text(text)
    truth = ("--val-ground-truth", str(tmp_path / "truth.txt"))
    assert words in command.refused(picture_folder, *truth)


def test_a_ground_truth_that_cannot_be_read(
    command: Command, picture_folder: Path, tmp_path: Path
) -> None:
    shutil.rmtree(picture_folder / "val")
    write_picture(picture_folder / "val" / "a.jpg", seed=1)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "kit.tar.gz").write_bytes(b"\x1f\x8b nonsense")
    ids = tmp_path / "ids"
    ids.mkdir()
    (ids / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n")
    (ids / "meta.mat").write_bytes(b"MATLAB 5.0".ljust(124) + b"\x00\x01IM" + b"\xff" * 64)
    for name, words in {
        "nothing": "There is no ground-truth file",
        "binary": "is not a text",
        "kit.tar.gz": "Cannot read",
        "ids": "Cannot read meta.mat",
        "pictures": "holds no ILSVRC2012_validation_ground_truth.txt",
    }.items():
        assert words in command.refused(picture_folder, "--val-ground-truth", str(tmp_path / name))


def test_options_that_contradict(command: Command, picture_folder: Path) -> None:
    assert "--short-side too" in command.refused(picture_folder, "--quality", "80")
    flat = picture_folder / "train" / "ash"
    assert "--per-class needs" in command.refused(flat, "--per-class", "2")
    for wrong in ("0", "-5", "12XB", "5M", "MB", ""):
        with pytest.raises(SystemExit):
            command(picture_folder, "--shard-size", wrong)
    assert command.around() == {}


def test_an_existing_folder_is_refused_and_replaced_on_request(
    command: Command, picture_folder: Path, tmp_path: Path
) -> None:
    assert command(picture_folder) == 0
    assert "--overwrite" in command.refused(picture_folder)
    before = IndexedShards.open(command.out).fingerprint
    # a failing run with --overwrite leaves the old shards
    (tmp_path / "x.tar").write_bytes(b"no tar")
    command.refused(tmp_path / "x.tar", "--overwrite")
    assert command(picture_folder, "--overwrite", "--seed", "1") == 0
    assert IndexedShards.open(command.out).fingerprint != before
    assert [p.name for p in command.out.parent.iterdir()] == [command.out.name]


def test_overwrite_deletes_nothing_but_shards(command: Command, picture_folder: Path) -> None:
    command.out.mkdir(parents=True)
    assert command(picture_folder) == 0  # an empty folder is as good as none
    (command.out / "thesis.tex").touch()
    assert "thesis.tex" in command.refused(picture_folder, "--overwrite")
    shutil.rmtree(command.out)
    command.out.mkdir()
    (command.out / "thesis.tex").touch()
    assert "holds other things" in command.refused(picture_folder, "--overwrite")
    shutil.rmtree(command.out)
    command.out.touch()
    assert "is a file" in command.refused(picture_folder, "--overwrite")


def test_a_place_that_cannot_be_written(command: Command, picture_folder: Path) -> None:
    command.out.parent.parent.mkdir(exist_ok=True)
    command.out.parent.touch()  # a file where a folder is needed
    assert f"Cannot write to {command.out.parent}" in command.refused(picture_folder)


def full_disk(*_: object) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_disk_that_fills_up(
    command: Command, picture_folder: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    assert command(picture_folder) == 0
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
        picture_folder, "--overwrite", "--shard-size", "6", "--seed", "1", workers=workers
    )
    assert f"The disk is full: no room left in {command.out.parent}" in message


def test_a_disk_that_fills_up_at_the_index(
    command: Command, picture_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_write_text", full_disk)
    assert "The disk is full" in command.refused(picture_folder)


def test_room_is_looked_for_before_anything_is_written(
    command: Command, picture_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=30_000))
    message = command.refused(picture_folder)
    assert "and" in message and "has only 30.0 kB left" in message


def test_a_killed_worker(
    command: Command, picture_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(picture: Any) -> NoReturn:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    monkeypatch.setattr(shard_file, "_source_bytes", die)
    assert "A worker process was killed" in command.refused(picture_folder, workers=2)


class StuckRun(NamedTuple):
    """A run in another process that has written a part of its first shard and goes no further."""

    process: ForkProcess
    pipe: int  # at its end when no process of the run lives
    log: Path


@contextlib.contextmanager
def stuck_run(command: Command, source: Path, workers: int) -> Iterator[StuckRun]:
    reader, writer = os.pipe()
    log = command.out.parent.parent / "log.txt"

    def run() -> NoReturn:
        original, read = shard_file._source_bytes, []

        def source_bytes(picture: Any) -> bytes:
            read.append(picture)
            if len(read) == 5:
                os.write(writer, b".")
                while True:
                    signal.pause()
            return original(picture)

        shard_file._source_bytes = source_bytes
        os.close(reader)
        with log.open("w") as sys.stdout, contextlib.redirect_stderr(sys.stdout):
            sys.exit(command(source, workers=workers))

    # Forked: starting a new interpreter would import torch once more, which takes seconds.
    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    os.close(writer)
    try:
        assert os.read(reader, 1) == b".", log.read_text()
        yield StuckRun(process, reader, log)
    finally:
        process.kill()
        process.join()
        os.close(reader)


def partial_folders(command: Command) -> list[Path]:
    found = command.out.parent.glob(f"{command.out.name}.partial-*")
    return [path for path in found if path.is_dir()]


def test_a_killed_run_leaves_nothing_that_looks_finished(
    command: Command, picture_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with stuck_run(command, picture_folder, workers=2) as run:
        assert "Another process is writing" in command.refused(picture_folder)
        run.process.kill()
        while os.read(run.pipe, 100):  # until the last worker has ended
            pass
    assert not command.out.exists()
    (left,) = partial_folders(command)
    assert not (left / "index.json").exists()
    assert command(picture_folder) == 0
    assert list(command.out.parent.glob("*.partial-*")) == []
    assert f"removed {left.name}" in capsys.readouterr().out
    assert len(IndexedShards.open(command.out)) == 24


def test_shards_are_written_to_a_network_s_file_system(
    command: Command, picture_folder: Path, locks_of_nfs: None
) -> None:
    command.out.with_name("shards.partial-0123abcd").mkdir(parents=True)
    command.out.with_name("shards.partial-0123abcd.lock").touch()  # of a run that was killed
    assert command(picture_folder) == 0
    assert list(command.out.parent.glob("*.partial-*")) == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_run_removes_what_it_wrote(
    command: Command, picture_folder: Path, number: signal.Signals, status: int
) -> None:
    with stuck_run(command, picture_folder, workers=1) as run:
        assert run.process.pid is not None
        os.kill(run.process.pid, number)
        run.process.join()
        assert run.process.exitcode == status
        assert "Traceback" not in run.log.read_text()
    assert command.around() == {}


def test_a_run_killed_while_replacing_gives_the_old_shards_back(
    command: Command, picture_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(picture_folder) == 0
    before = IndexedShards.open(command.out).fingerprint
    # the state between the two renames
    command.out.rename(command.out.with_name("shards.replaced-0123abcd"))
    command.out.with_name("shards.partial-0123abcd").mkdir()
    assert command(picture_folder) == 2  # the folder is there again, and is not replaced unasked
    assert "--overwrite" in capsys.readouterr().err
    assert [p.name for p in command.out.parent.iterdir()] == [command.out.name]
    assert IndexedShards.open(command.out).fingerprint == before


def test_a_rename_that_fails_keeps_the_old_shards(
    command: Command, picture_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(picture_folder) == 0
    original = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if ".partial-" in self.name and target == command.out:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return original(self, target)

    monkeypatch.setattr(output_folder.Path, "rename", rename)
    assert "mount point" in command.refused(picture_folder, "--overwrite", "--seed", "1")

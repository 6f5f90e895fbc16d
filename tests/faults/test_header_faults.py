"""Tars that are not those their index was made of: found at the start, and read once for it."""

import errno
import fcntl
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from harness import in_processes, run_ranks

from moco_scale.__main__ import main
from moco_scale.data.open import open_shards
from moco_scale.data.shards import header_check, index_place
from moco_scale.data.shards.indexed_shards import IndexedShards
from moco_scale.data.shards.tar_scan import ShardScan, member_places, scan_tar
from moco_scale.data.tools import examine
from moco_scale.distributed import consensus
from moco_scale.utils.errors import UserError


@pytest.fixture
def folder(tiny_shards: Path, tmp_path: Path) -> Path:
    """32 training images in 4 shards, written as if yesterday."""
    folder = tmp_path / "shards"
    shutil.copytree(tiny_shards, folder)
    return folder


def counted(
    names: list[str], path: Path, file: int | None = None
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    names.append(path.name)
    return member_places(path, file)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of tars whose headers were read."""
    names: list[str] = []
    monkeypatch.setattr(header_check, "member_places", partial(counted, names))
    return names


def everything(shards: IndexedShards) -> list[bytes]:
    return [bytes(shards.read(i)) for i in range(len(shards))]


def middle_header(tar: Path) -> int:
    """Change a byte in the header of an image in the middle; returns the header's place."""
    with tarfile.open(tar) as members:
        at = members.getmembers()[8].offset
    with tar.open("r+b") as file:
        file.seek(at + 10)
        file.write(b"\xff")
    return at


def size_kept(tar: Path) -> None:
    """Another tar of the same size in its place: the members in another order."""
    size, other = tar.stat().st_size, tar.with_suffix(".new")
    with tarfile.open(tar) as old, tarfile.open(other, "w", format=tarfile.USTAR_FORMAT) as new:
        for member in reversed(old.getmembers()):
            new.addfile(member, old.extractfile(member))
    os.truncate(other, size)
    other.replace(tar)


def test_a_damaged_header_is_named_at_the_start_and_can_be_repaired(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything(IndexedShards.open(folder))
    tar = folder / "train-000002.tar"
    at = middle_header(tar)
    for _ in range(2):  # what is wrong stays wrong
        with pytest.raises(UserError) as caught:
            IndexedShards.open(folder)
        message = str(caught.value)
        assert f"Shard {tar} is damaged: the header at byte {at}" in message
        assert f"`python -m moco_scale shard --repair {folder}` keeps what" in message
    assert main(["shard", "--repair", str(folder)]) == 0
    assert everything(IndexedShards.open(folder)) == before


def test_a_header_that_claims_another_size_or_place(folder: Path) -> None:
    tar = folder / "train-000001.tar"
    size_kept(tar)
    with pytest.raises(UserError, match=rf"Shard {tar} is not the one that its index was made of"):
        IndexedShards.open(folder)


def test_what_was_found_right_is_not_read_again(folder: Path, read: list[str]) -> None:
    before = everything(IndexedShards.open(folder))
    assert read == []  # the writer's word
    os.utime(folder / "train-000001.tar")
    assert everything(IndexedShards.open(folder)) == before
    assert read == ["train-000001.tar"]
    IndexedShards.open(folder)
    assert len(read) == 1
    for tar in folder.glob("*.tar"):  # as after a copy that does not keep times
        os.utime(tar, (1, 1))
    assert len(IndexedShards.open(folder, "val")) == 8
    assert everything(IndexedShards.open(folder)) == before
    assert len(set(read[1:])) == len(read[1:]) == len(list(folder.glob("*.tar")))


def test_a_note_of_another_index_or_a_damaged_one_counts_for_nothing(
    folder: Path, read: list[str]
) -> None:
    note = folder / index_place.FOLDER / "train-checked.json"
    whole = note.read_text()
    others = ("", "[]", "{}", '{"index": 1, "right": 2}', whole.replace("[[", "[[], ["))
    for content in (*others, whole.replace('"right": [', '"right": [3, ')):
        read.clear()
        note.write_text(content)
        IndexedShards.open(folder)
        assert len(read) == 4
        assert note.read_text() == whole


def test_all_that_is_wrong_is_named_and_the_rest_is_not_read_again(
    folder: Path, read: list[str]
) -> None:
    for tar in folder.glob("*.tar"):
        os.utime(tar, (1, 1))
    middle_header(folder / "train-000001.tar")
    size_kept(folder / "train-000003.tar")
    for expected in (4, 2):
        read.clear()
        with pytest.raises(UserError) as caught:
            IndexedShards.open(folder)
        assert f"Shard {folder}/train-000001.tar is damaged" in str(caught.value)
        assert "Not right either: train-000003.tar." in str(caught.value)
        assert len(read) == expected


def test_copies_with_other_times_share_a_note(folder: Path, read: list[str]) -> None:
    for time in (1, 2, 1, 2):
        for tar in folder.glob("*.tar"):
            os.utime(tar, (time, time))
        IndexedShards.open(folder)
    assert len(read) == 8


def test_a_tar_that_cannot_be_read_is_no_damaged_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.utime(folder / "train-000002.tar", (1, 1))

    def refused(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(header_check, "member_places", refused)
    with pytest.raises(UserError) as caught:
        IndexedShards.open(folder)
    assert str(caught.value) == f"Cannot read shard {folder}/train-000002.tar: Permission denied."


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_repairing_gives_up_nothing_that_cannot_be_read(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "train-000002.tar").chmod(0)
    before = (folder / "train-index.npy").read_bytes()
    assert main(["shard", "--repair", str(folder)]) == 2
    assert "train-000002.tar: cannot be read: Permission denied" in capsys.readouterr().err
    assert (folder / "train-index.npy").read_bytes() == before


def test_repairing_gives_up_nothing_that_fails_while_it_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (folder / "train-index.npy").read_bytes()
    middle_header(folder / "train-000000.tar")

    def broken(path: Path) -> ShardScan:
        if path.name == "train-000002.tar":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return scan_tar(path)

    monkeypatch.setattr(examine, "scan_tar", broken)
    assert main(["shard", "--repair", str(folder), "--workers", "1"]) == 2
    assert (
        "train-000002.tar: cannot be read: Input/output error. Its image" in capsys.readouterr().err
    )
    assert (folder / "train-index.npy").read_bytes() == before


def test_a_full_disk_under_the_note_stops_nobody(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    os.utime(folder / "train-000002.tar", (1, 1))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(header_check, "write_atomically", full)
    assert len(IndexedShards.open(folder)) == 32
    assert "No space left on device): they are read again" in capsys.readouterr().err


def _open_often(folder: Path, gate: Any) -> str:
    try:
        for _ in range(20):
            gate.wait()
            shutil.rmtree(folder / index_place.FOLDER, ignore_errors=True)
            gate.wait()
            IndexedShards.open(folder)
    except BaseException as error:
        gate.abort()
        return repr(error)
    return ""


def test_where_nothing_can_be_locked_processes_do_not_disturb_each_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(index_place, "MOST_WORKERS", 1)
    assert in_processes(4, _open_often, folder) == [""] * 4


def test_shards_that_replace_others_are_known(
    folder: Path, read: list[str], image_folder: Path
) -> None:
    options = ["--source", str(image_folder), "--out", str(folder), "--overwrite"]
    assert main(["shard", *options, "--workers", "1"]) == 0
    assert len(IndexedShards.open(folder)) == 24
    assert read == []


def test_a_folder_that_cannot_be_written_is_noted_in_the_cache(
    folder: Path,
    tmp_path: Path,
    read: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.rmtree(folder / index_place.FOLDER)
    (folder / index_place.FOLDER).touch()  # no folder can be made here, not even by root
    monkeypatch.setenv("MOCO_SCALE_CACHE", str(tmp_path / "cache"))
    for _ in range(2):
        IndexedShards.open(folder)
        assert len(read) == 4
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOCO_SCALE_CACHE", str(tmp_path / "file"))
    IndexedShards.open(folder)
    assert len(read) == 8
    said = capsys.readouterr().err
    assert "each process reads the headers" in said and "MOCO_SCALE_CACHE" in said
    middle_header(folder / "train-000000.tar")
    with pytest.raises(UserError, match="is damaged"):
        IndexedShards.open(folder)


@pytest.mark.parametrize("change", [size_kept, middle_header])
def test_a_tar_replaced_during_a_run_is_named_by_who_opens_it(
    change: Callable[[Path], object], folder: Path, read: list[str]
) -> None:
    shards = IndexedShards.open(folder)
    before = everything(IndexedShards.open(folder))
    other = next(i for i in range(len(shards)) if "train-000002.tar" in shards.where(i))
    os.utime(folder / "train-000000.tar")  # touched, and still what it was
    change(folder / "train-000002.tar")
    with pytest.raises(UserError, match=r"train-000002.tar was changed while it was in use"):
        shards.read(other)
    assert read == ["train-000002.tar"]
    good = [i for i in range(len(shards)) if "train-000002.tar" not in shards.where(i)]
    assert [bytes(shards.read(i)) for i in good] == [before[i] for i in good]
    assert read == ["train-000002.tar", "train-000000.tar"]


def test_copies_of_the_images_watch_too(folder: Path) -> None:
    whole = IndexedShards.open(folder)
    part = pickle.loads(pickle.dumps(whole.subset(np.arange(31, -1, -1))))
    size_kept(folder / "train-000003.tar")
    with pytest.raises(UserError, match=r"train-000003.tar was changed while it was in use"):
        part.read(0)


def test_a_tar_without_an_index_that_is_replaced_during_a_run_is_named(folder: Path) -> None:
    (folder / "index.json").unlink()
    mixed = open_shards(f"{folder}:1,{folder}:1", "train")
    shards = open_shards(folder, "train")
    size_kept(folder / "train-000003.tar")
    for images in (mixed, shards):
        assert len(images.read(0)) > 0
        with pytest.raises(UserError, match=r"train-000003.tar was changed while it was in use"):
            images.read(len(images) - 1)


def opened(folder: Path) -> tuple[int, list[str], str]:
    """Images, tars read by this rank, error."""
    names: list[str] = []
    header_check.member_places = partial(counted, names)
    index_place.MOST_WORKERS = 1
    try:
        return len(consensus.rank0_first(partial(open_shards, folder, "train"))), names, ""
    except UserError as error:
        return 0, names, str(error)


def test_one_rank_reads_for_all(folder: Path) -> None:
    shutil.rmtree(folder / index_place.FOLDER)
    first, *others = run_ranks(opened, 4, folder)
    assert first[0] == 32 and sorted(first[1]) == [f"train-{i:06d}.tar" for i in range(4)]
    assert others == [(32, [], "")] * 3
    middle_header(folder / "train-000003.tar")
    assert all(
        "train-000003.tar is damaged" in error for _, _, error in run_ranks(opened, 2, folder)
    )

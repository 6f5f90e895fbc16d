"""Tars that are not those their index was made of: found at the start, and read once for it."""

import os
import shutil
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from harness import run_ranks

from moco_scale import together
from moco_scale.__main__ import main
from moco_scale.data import header_check, index_place
from moco_scale.data.index import IndexedShards
from moco_scale.data.open_shards import open_shards
from moco_scale.data.tar_scan import member_places
from moco_scale.errors import UserError


@pytest.fixture
def folder(tiny_shards: Path, tmp_path: Path) -> Path:
    """32 training pictures in 4 shards, written as if yesterday."""
    folder = tmp_path / "shards"
    shutil.copytree(tiny_shards, folder)
    return folder


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of tars whose headers were read."""
    names: list[str] = []

    def counted(path: Path) -> set[tuple[int, int]]:
        names.append(path.name)
        return member_places(path)

    monkeypatch.setattr(header_check, "member_places", counted)
    return names


def everything(shards: IndexedShards) -> list[bytes]:
    return [bytes(shards.read(i)) for i in range(len(shards))]


def middle_header(tar: Path) -> int:
    """Change a byte in the header of a picture in the middle; returns the header's place."""
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
        command = f"shard --repair {folder}"
        assert message.endswith(command)
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
    for content in ("", "[]", "{}", '{"index": 1, "changed": 2}', whole.replace("[", "[0, ")):
        read.clear()
        note.write_text(content)
        IndexedShards.open(folder)
        assert len(read) == 4
        assert note.read_text() == whole


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
    assert "cannot be noted, neither in" in capsys.readouterr().err
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


def opened(folder: Path) -> tuple[int, list[str], str]:
    """Pictures, tars read by this rank, error."""
    names: list[str] = []

    def counted(path: Path) -> set[tuple[int, int]]:
        names.append(path.name)
        return member_places(path)

    header_check.member_places = counted
    index_place.MOST_WORKERS = 1
    try:
        return len(together.in_turn(partial(open_shards, folder, "train"))), names, ""
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

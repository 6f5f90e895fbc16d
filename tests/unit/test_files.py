"""Files are whole or not there, and locks are one process's at a time."""

import errno
import os
from pathlib import Path

import pytest

from moco_scale.utils import locks
from moco_scale.utils.files import replacing, require_writable, sync


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_a_file_that_is_not_written_to_its_end_leaves_the_old_one(
    tmp_path: Path, shared: bool, error: BaseException
) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(type(error)), replacing(path, shared=shared) as file:
        file.write(b"ne")
        raise error
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]
    with replacing(path, shared=shared) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and [*tmp_path.iterdir()] == [path]


def test_what_is_written_goes_to_no_place_that_a_link_names(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("of somebody")
    (tmp_path / ".file.tmp").symlink_to(other)
    with replacing(tmp_path / "file") as file:
        file.write(b"mine")
    assert other.read_text() == "of somebody" and (tmp_path / "file").read_text() == "mine"


def test_a_folder_is_made_and_nothing_is_left_in_it(tmp_path: Path) -> None:
    require_writable(tmp_path / "a" / "b")
    assert [*(tmp_path / "a" / "b").iterdir()] == []
    with pytest.raises(OSError, match="Not a directory"):
        (tmp_path / "file").touch()
        require_writable(tmp_path / "file" / "below")


def test_only_a_folder_that_cannot_be_synced_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = errno.EINVAL

    def fsync(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    (tmp_path / "file").touch()
    sync(tmp_path)
    with pytest.raises(OSError, match="Invalid argument"):
        sync(tmp_path / "file")
    number = errno.EIO
    with pytest.raises(OSError, match="Input/output error"):
        sync(tmp_path)


def test_who_has_a_lock_keeps_others_out(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("w+") as first, path.open("r+") as second:
        assert locks.try_lock(first) and not locks.try_lock(second)
        locks.share(first)
        locks.share(second)
        assert not locks.try_lock(first)
        second.close()
        assert locks.try_lock(first)

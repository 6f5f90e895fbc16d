"""Files beside the model: what cannot be written is said, kept, and written when it can be."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moco_scale.observe import metrics_file, side_files
from moco_scale.observe.metrics_file import forget_after
from moco_scale.observe.side_files import SideFile, json_line, json_text
from moco_scale.untrusted.documents import lines_of, record_of
from moco_scale.utils.errors import UserError


class Disk:
    """Writes of at most so many bytes more, and truncation, or their failure."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room: int | None = None
        self.reason = errno.ENOSPC
        self.truncates = True
        self._write, self._ftruncate = os.write, os.ftruncate
        monkeypatch.setattr(os, "write", self.write)
        monkeypatch.setattr(os, "ftruncate", self.ftruncate)

    def write(self, file: int, data: bytes) -> int:
        if self.room is not None:
            data = data[: self.room]
            if not data:
                raise OSError(self.reason, os.strerror(self.reason))
            self.room -= len(data)
        return self._write(file, data)

    def ftruncate(self, file: int, size: int) -> None:
        if not self.truncates:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._ftruncate(file, size)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.mark.parametrize("room", range(0, 9))
@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG])
def test_nothing_is_lost_or_cut_by_a_disk_that_is_full_for_a_while(
    tmp_path: Path, disk: Disk, room: int, reason: int
) -> None:
    said: list[str] = []
    file = SideFile(tmp_path / "log", b"head\n", warn=said.append)
    file.add(b"one\n")
    disk.room, disk.reason = room, reason
    file.add(b"two\n")
    file.add(b"three\n")
    disk.room = None
    file.add(b"four\n")
    file.add(b"five\n")
    file.close()
    assert (tmp_path / "log").read_bytes() == b"head\none\ntwo\nthree\nfour\nfive\n"
    assert len(said) == 2
    assert f"cannot write {tmp_path}/log: {os.strerror(reason)}; training continues" in said[0]
    assert "can be written again; all is there" in said[1]


def test_what_was_cut_is_cut_off_before_anything_follows(tmp_path: Path, disk: Disk) -> None:
    file = SideFile(tmp_path / "log", warn=lambda text: None)
    file.add(b"one\n")
    disk.room = 2
    file.add(b"two\n")
    assert (tmp_path / "log").read_bytes() == b"one\ntw"
    disk.room, disk.truncates = None, False
    file.add(b"three\n")
    assert (tmp_path / "log").read_bytes() == b"one\ntw"
    disk.truncates = True
    file.close()
    assert (tmp_path / "log").read_bytes() == b"one\ntwo\nthree\n"


def test_what_never_could_be_written_is_counted(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(side_files, "_WAITING", 10)
    file = SideFile(tmp_path / "log", warn=said.append)
    disk.room = 0
    for number in range(5):
        file.add(b"%d...\n" % number)
    disk.room = None
    file.add(b"5...\n")
    assert (tmp_path / "log").read_bytes() == b"3...\n4...\n5...\n"
    disk.room = 0
    file.add(b"6...\n")
    file.close()
    assert len(said) == 3
    assert "3 entries that could not be written are lost" in said[1]
    assert "4 entries that could not be written are lost" in said[2]


@pytest.mark.parametrize("target", ["/dev/full", "folder", "fifo", "gone"])
def test_a_name_that_cannot_be_written_ends_nothing(tmp_path: Path, target: str) -> None:
    said: list[str] = []
    folder = tmp_path / "out"
    folder.mkdir()
    path = folder / "log"
    if target == "folder":
        path.mkdir()
    elif target == "fifo":
        os.mkfifo(path)  # which nobody reads
    elif target == "gone":
        path = folder / "missing" / "two" / "log"
    else:
        path.symlink_to(target)
    file = SideFile(path, b"head", warn=said.append)
    for _ in range(3):
        file.add(b"x" * 10)
    file.close()
    assert len(said) == 2 and "training continues" in said[0] and "3 entries" in said[1]


def test_a_removed_file_or_folder_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "tensorboard" / "events"
    file = SideFile(path, b"head ")
    file.add(b"one ")
    shutil.rmtree(path.parent)
    file.add(b"two ")
    path.unlink()
    file.add(b"three ")
    assert path.read_bytes() == b"head three "


@pytest.mark.parametrize("error", [OSError(errno.EIO, "so it goes"), UserError("so it goes")])
def test_a_folder_that_is_not_ours_any_more_is_not_written(
    tmp_path: Path, error: Exception
) -> None:
    said: list[str] = []

    def refuse() -> None:
        raise error

    file = SideFile(tmp_path / "log", before=refuse, warn=said.append)
    file.add(b"one")
    assert not (tmp_path / "log").exists()
    assert "log: so it goes; training continues" in said[0]


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters()),
    lambda values: st.lists(values) | st.dictionaries(st.text(st.characters()), values),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(anything)
def test_json_lines_hold_any_name_and_give_it_back(value: object) -> None:
    line = json_line({"name": value})
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    text = line[:-1].decode("utf-8")
    assert text.isprintable() and len(text.splitlines()) == 1
    assert json.loads(text) == {"name": value} == record_of(line)
    assert json.loads(json_text(value, indent=1)) == value


def test_names_that_print_stay_as_they_are() -> None:
    assert json_line({"key": "héllo 日本"}) == '{"key": "héllo 日本"}\n'.encode()
    assert json_line("\udce9\x1b[2J\u2028\x85") == b'"\\udce9\\u001b[2J\\u2028\\u0085"\n'


@pytest.mark.parametrize(
    "line", [b"", b"[1]", b"3", b'{"step": ', b"\xff", b"[" * 100_000, b'{"step": "5"}']
)
def test_what_is_no_record_of_a_step_is_dropped(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / metrics_file.NAME
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    assert metrics_file.has_step(path, 2) and not metrics_file.has_step(path, 5)
    assert forget_after(path, 2) == 1
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_only_line_feeds_end_lines(tmp_path: Path) -> None:
    lines = ["a\u2028b\x0b\x0c\x1c\x85\r".encode() + b"\n", b"rest"]
    (tmp_path / "file").write_bytes(b"".join(lines))
    assert list(lines_of(tmp_path / "file")) == lines


def test_what_has_no_end_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / metrics_file.NAME
    path.symlink_to("/dev/zero")
    assert not metrics_file.has_step(path, 1)
    with pytest.raises(OSError, match="no regular file"):
        forget_after(path, 1)


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_steps_that_run_again_are_forgotten_on_a_full_disk_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / metrics_file.NAME
    path.write_bytes(b"".join(json_line({"step": step}) for step in range(1, 5)))
    write: Callable[..., object] = full
    monkeypatch.setattr(side_files, "write_atomically", write)
    assert forget_after(path, 2) == 2
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_log_lines_of_steps_that_run_again_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / metrics_file.NAME
    assert forget_after(path, 0) == 0
    lines = [json.dumps({"step": s, "loss": 1.5}) + "\n" for s in (1, 2, 3, 4)]
    path.write_text("".join(lines))
    assert forget_after(path, 2) == 2
    assert path.read_text() == "".join(lines[:2])
    assert forget_after(path, 2) == 0
    assert forget_after(path, 0) == 2
    assert path.read_text() == ""


@pytest.mark.parametrize("cut", range(1, 24))
def test_a_line_cut_by_a_kill_does_not_spoil_the_next(tmp_path: Path, cut: int) -> None:
    path = tmp_path / metrics_file.NAME
    whole = [json.dumps({"step": s, "loss": 1.5}) + "\n" for s in (1, 2)]
    path.write_text("".join(whole)[:-cut])
    forget_after(path, 2)
    with open(path, "a") as file:
        file.write(json.dumps({"step": 3}) + "\n")
    found = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    # Only the line feed was lost: the record is there. Otherwise the record is lost.
    assert found == ([1, 2, 3] if cut == 1 else [1, 3])

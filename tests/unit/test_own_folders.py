"""Folders whose names can be foreseen: made, known again, and left alone if they are not ours."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from moco_scale.engines import blocks
from moco_scale.utils.errors import UserError
from moco_scale.utils.own_folders import (
    PASSING,
    ForeignFolderError,
    make_own,
    open_own,
    remove_own,
    remove_passing,
    without_links,
)


def test_it_is_marked_once_and_known_again(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    assert make_own(folder, ".mark", 0o700)
    assert not make_own(folder, ".mark")
    assert folder.stat().st_mode & 0o777 == 0o700
    (folder / "file").touch()
    assert not make_own(folder, ".mark")
    os.close(open_own(folder, ".mark"))


def test_an_empty_folder_may_be_taken_and_no_other(tmp_path: Path) -> None:
    """A process that was killed leaves an empty one; what holds anything else was marked first."""
    (tmp_path / "empty").mkdir()
    make_own(tmp_path / "empty", ".mark")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis").touch()
    with pytest.raises(ForeignFolderError, match="full was not made by this program"):
        make_own(tmp_path / "full", ".mark")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / ".mark").symlink_to(tmp_path / "empty" / ".mark")
    with pytest.raises(ForeignFolderError, match="linked was not made by this program"):
        make_own(tmp_path / "linked", ".mark")


@pytest.mark.parametrize("what", ["link", "dangling", "file", "another user's"])
def test_what_is_not_ours_is_refused(tmp_path: Path, what: str) -> None:
    folder, target = tmp_path / "own", tmp_path / "target"
    if what == "file":
        folder.touch()
    elif what == "another user's":
        if os.geteuid():
            pytest.skip("to make another user's folder takes root")
        folder.mkdir()
        os.chown(folder, 12345, 12345)
    else:
        if what == "link":
            target.mkdir()
            (target / "file").touch()
        folder.symlink_to(target)
    for attempt in (make_own, open_own):
        with pytest.raises(ForeignFolderError):
            attempt(folder)
    with pytest.raises(ForeignFolderError):
        remove_own(folder, ["file"])
    assert target.exists() == (what == "link")
    assert what != "link" or (target / "file").exists()


def test_compiled_programs_are_kept_in_a_folder_of_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    blocks.own_compile_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine" and not list(tmp_path.iterdir())
    folder = tmp_path / f"moco_scale-compiled-{os.geteuid()}"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    folder.symlink_to("elsewhere")
    with pytest.raises(UserError, match=r"--compile .* TORCHINDUCTOR_CACHE_DIR"):
        blocks.own_compile_cache()
    folder.unlink()
    blocks.own_compile_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700


DRAW = """
import io
from moco_scale.evaluation.curves import new_figure
figure = new_figure()
figure.text(0, 0, "x")
figure.savefig(io.BytesIO())
"""


def test_figures_are_drawn_in_silence_where_the_home_cannot_be_written(tmp_path: Path) -> None:
    """Nothing can be made below a file, by root neither."""
    home = tmp_path / "file"
    home.touch()
    (tmp_path / "tmp").mkdir()
    removed = {"MPLCONFIGDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"}
    environment = {k: v for k, v in os.environ.items() if k not in removed}
    environment |= {"HOME": str(home / "nowhere"), "TMPDIR": str(tmp_path / "tmp")}
    run = subprocess.run([sys.executable, "-c", DRAW], env=environment, capture_output=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, b"", b"")
    assert not list((tmp_path / "tmp").iterdir())


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    """Nor one that somebody reads, nor a folder, in the place of a file such as a lock's."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for flags in (os.O_RDONLY, os.O_WRONLY | os.O_CREAT, os.O_RDWR | os.O_CREAT):
        for name in ("pipe", "folder"):
            with pytest.raises(OSError, match=r"No such device|no regular file|Is a directory"):
                without_links(str(tmp_path / name), flags)
        os.close(without_links(str(tmp_path / "file"), flags | os.O_CREAT))


def test_what_passes_is_removed_and_nothing_else(tmp_path: Path) -> None:
    passing, other = tmp_path / "passing", tmp_path / "other"
    for folder in (passing, other):
        folder.mkdir()
        (folder / "socket").touch()
    PASSING.add(str(passing))
    remove_passing({str(other)})
    assert passing.exists() and other.exists()
    remove_passing()
    assert not passing.exists() and other.exists()
    assert str(passing) not in PASSING

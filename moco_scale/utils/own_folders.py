"""Folders that this program made: known by owner and marker, and never reached through a link.

Others may write beside such a folder (``/dev/shm``, a scratch disk, a shared cache), and its name
can be foreseen: a link, or somebody else's folder, may stand there. Nothing in it is then read,
written or removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


PASSING: set[str] = set()
"""Folders in TMPDIR that nothing needs after this process, which removes them when it leaves."""


class ForeignFolderError(OSError):
    """Something else has the name of a folder of this program; described in ``strerror``."""

    def __init__(self, folder: str | Path, what: str) -> None:
        super().__init__(errno.EACCES, f"{folder} {what}")


def make_own(folder: Path, marker: str = "", mode: int = 0o777) -> bool:
    """Make a folder of this program unless it exists.

    Args:
        folder: to make; its parent exists.
        marker: name of a file that marks it; an empty folder without it gets it.
        mode: of a new folder, less the umask.

    Returns:
        Whether this process has made it.

    Raises:
        ForeignFolderError: An existing one is no folder, another user's, or has no marker.
        OSError: It cannot be made.
    """
    made, at = False, -1
    while at < 0:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode)
            made = True
        with contextlib.suppress(FileNotFoundError):  # somebody has just removed it
            at = open_own(folder)
    try:
        # Who makes a folder marks it before anything else is put there.
        if marker and not _is_marked(at, marker):
            if os.listdir(at) and not _is_marked(at, marker):
                raise ForeignFolderError(folder, f"was not made by this program: no {marker} in it")
            with contextlib.suppress(FileExistsError):
                os.close(os.open(marker, NEW_FILE, 0o666, dir_fd=at))
    finally:
        os.close(at)
    return made


NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
"""Flags of a file that nobody has made yet; a link there is an error."""


def open_own(folder: str | Path, marker: str = "", at: int | None = None) -> int:
    """Open a folder of this program and return its descriptor, through which files are safe.

    Args:
        folder: path; relative to ``at`` if that is given.
        marker: as of :func:`make_own`.
        at: descriptor of its parent.

    Raises:
        FileNotFoundError: There is none.
        ForeignFolderError: Something else is there.
        OSError: It cannot be opened.
    """
    try:
        descriptor = os.open(folder, _FOLDER, dir_fd=at)
    except OSError as error:
        # A link is ENOTDIR here, ELOOP elsewhere.
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            raise ForeignFolderError(folder, "is a file or a link, and no folder") from None
        raise
    try:
        if not _is_mine(descriptor):
            raise ForeignFolderError(folder, "belongs to another user")
        if marker and not _is_marked(descriptor, marker):
            raise ForeignFolderError(folder, f"was not made by this program: no {marker} in it")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def opened(folder: str | Path, marker: str = "", at: int | None = None) -> Iterator[int]:
    """Hold :func:`open_own` open within the ``with`` block."""
    descriptor = open_own(folder, marker, at)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def remove_own(folder: Path, names: Collection[str]) -> None:
    """Remove these files of a folder of this program, and the folder if it is then empty.

    Raises:
        OSError: As of :func:`open_own`, or a file cannot be removed.
    """
    with opened(folder) as at:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=at)
    try:
        os.rmdir(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            raise


def remove_passing(folders: Collection[str] | None = None) -> None:
    """Remove these of :data:`PASSING`, all by default, as far as possible."""
    for folder in PASSING.intersection(folders) if folders is not None else list(PASSING):
        with contextlib.suppress(OSError):
            os.rmdir(folder)  # also where no more files can be opened
        shutil.rmtree(folder, ignore_errors=True)
        PASSING.discard(folder)


def without_links(path: str, flags: int) -> int:
    """Open a path that is no link, without waiting: an ``opener`` for :func:`open`.

    Raises:
        OSError: Also for a folder, a pipe or a device.
    """
    # Without O_NONBLOCK, opening a pipe waits for its other end; to a file it means nothing.
    file = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "it is no regular file", path)
    return file


def _is_mine(folder: int) -> bool:
    owner = os.fstat(folder).st_uid
    if owner == os.geteuid():
        return True
    # Some file systems give all files one owner (NFS of root's, CIFS, FUSE): that of a new one too.
    name = f".owner-{secrets.token_hex(8)}"
    try:
        probe = os.open(name, NEW_FILE, 0o600, dir_fd=folder)
    except OSError:
        return False
    try:
        return os.fstat(probe).st_uid == owner
    finally:
        os.close(probe)
        os.unlink(name, dir_fd=folder)


def _is_marked(folder: int, marker: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(marker, dir_fd=folder, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False

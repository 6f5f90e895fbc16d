"""Locks on open files, which end with the process that holds them, however it ends.

A network file system (NFS) needs write access for an exclusive lock, and read access for a shared
one.
"""

from __future__ import annotations

import errno
import fcntl
from typing import IO

File = int | IO[bytes] | IO[str]

NO_LOCKS = {errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""What is answered on file systems, of networks as a rule, that have no locks or have lost who
keeps them."""


def lock(file: File) -> None:
    """Take an exclusive lock; wait until no other process holds one."""
    fcntl.flock(file, fcntl.LOCK_EX)


def try_lock(file: File) -> bool:
    """Try to take an exclusive lock; False where another process holds one."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def share(file: File) -> None:
    """Take a shared lock; wait until no process holds an exclusive one."""
    fcntl.flock(file, fcntl.LOCK_SH)

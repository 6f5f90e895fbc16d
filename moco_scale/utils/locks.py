"""Locks on open files, which end with the process that holds them, however it ends.

A network's file system (NFS) locks a file for one process alone only if it can be written, and for
several only if it can be read.
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
    """Lock a file for this process alone, as soon as no other holds it."""
    fcntl.flock(file, fcntl.LOCK_EX)


def try_lock(file: File) -> bool:
    """Lock a file for this process alone; False where another holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def share(file: File) -> None:
    """Keep others from locking a file for themselves alone, as soon as none does."""
    fcntl.flock(file, fcntl.LOCK_SH)

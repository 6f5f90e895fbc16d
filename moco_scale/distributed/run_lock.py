"""Lock of an output folder: one run at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from moco_scale.distributed import consensus
from moco_scale.utils.errors import StoppedEarly, UserError
from moco_scale.utils.log import log
from moco_scale.utils.own_folders import without_links

LEASE = 120.0
"""Seconds that another host's lock is waited for: that of an NFS client that died ends with its
lease, 90 s as a rule."""
_PAUSE = 5.0


class RunLock:
    """Keeps other runs out of a folder for as long as this process lives.

    Args:
        path: the lock file, with the writer's mark.
        host: this one's name.
        clock: seconds.
        sleep: for so many seconds.

    Attributes:
        path: the file.
        mark: of this process, in the file.
    """

    def __init__(
        self,
        path: Path,
        host: str = socket.gethostname(),
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.path = path
        self._host, self._clock, self._sleep = host, clock, sleep
        # Told apart from what an earlier run has left there.
        self.mark = f"{host} {os.getpid()} {secrets.token_hex(8)}\n"
        self._file: TextIO | None = None
        self._alone = threading.Lock()  # who saves in the background asks too

    def claim(self) -> None:
        """Take the lock; wait a while for another host's, which may have died.

        Check the folder only afterwards: it may have changed before.

        Raises:
            UserError: Another run on this host has it.
            StoppedEarly: A run on another host still has it: it may be saving, so that the same
                command finds the folder free later.
            OSError: The file cannot be written.
        """
        file = self._open()
        deadline: float | None = None
        while not _lock(file):
            file.seek(0)
            words = file.read().split()
            holder = f" (process {words[1]} on {words[0]})" if len(words) == 3 else ""
            elsewhere = bool(holder) and words[0] != self._host
            if elsewhere and deadline is None:
                deadline = self._clock() + LEASE
                log.info(
                    f"--output-dir {self.path.parent} is locked by another host{holder}; if that "
                    f"one has died, its lock ends within two minutes: waiting"
                )
            if not elsewhere or (deadline is not None and self._clock() >= deadline):
                file.close()
                busy = f"--output-dir {self.path.parent} is being written by another run{holder}; "
                if deadline is None:
                    raise UserError(busy + "wait until that has ended, or choose another folder")
                raise StoppedEarly(
                    f"{busy}waited {LEASE:.0f} s; start the same command once that has ended"
                )
            self._sleep(_PAUSE)
        self._take(file)

    def _take(self, file: TextIO) -> None:
        self._file = file
        file.truncate(0)
        file.write(self.mark)
        file.flush()
        os.fsync(file.fileno())

    def hold(self) -> bool:
        """Check, before a write, that the folder is this run's; make it again if it was removed.

        Returns:
            Whether it was made again.

        Raises:
            UserError: Another run has taken the folder.
            OSError: It cannot be made.
        """
        with self._alone:
            if self._file is None or self._is_there(self._file):
                return False
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self._open()
            file.seek(0)
            if not _lock(file) or file.read() not in ("", self.mark):
                file.close()
                raise UserError(
                    f"--output-dir {self.path.parent} was removed during the run, and is another "
                    "run's now"
                )
            self._file.close()
            self._take(file)
            return True

    def _open(self) -> TextIO:
        # Whatever somebody has written there is shown, at most.
        return open(self.path, "a+", encoding="utf-8", errors="replace", opener=without_links)

    def _is_there(self, file: TextIO) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
                return False
            raise

    def release(self) -> None:
        """Let other runs write there."""
        if self._file is not None:
            self._file.close()
            self._file = None


def claim_for_all(lock: RunLock) -> None:
    """Take a lock on rank 0 for all ranks; all call it.

    Raises:
        UserError: As in :meth:`RunLock.claim`, on every rank; or it cannot be written.
        StoppedEarly: As in :meth:`RunLock.claim`, on every rank.
    """

    def claim() -> StoppedEarly | None:
        try:
            lock.claim()
        except StoppedEarly as error:
            return error
        except OSError as error:
            raise UserError(f"{lock.path} cannot be written: {error.strerror or error}") from error
        return None

    busy = consensus.broadcast_from_main(claim)
    if busy is not None:
        raise busy


def _lock(file: TextIO) -> bool:
    """Lock a file for this process; False where another has it."""
    try:
        # A record lock: unlike flock's, it is not inherited by the processes that read data.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass  # a file system without locks
    return True

"""One run at a time in an output folder."""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from moco_scale.errors import UserError
from moco_scale.messages import say

LEASE = 120.0
"""Seconds that another host's lock is waited for: that of an NFS client that died ends with its
lease, 90 s as a rule."""
_PAUSE = 5.0


class RunLock:
    """Keeps other runs out of a folder for as long as this process lives.

    Args:
        path: the file that says who writes there.
        host: this one's name.
        clock: seconds.
        sleep: for so many of them.

    Attributes:
        path: the file.
        mark: what this process writes into it.
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

    def claim(self) -> None:
        """Take it; of another host's, wait a while whether it is that of one that has died.

        Raises:
            UserError: another run has it.
            OSError: the file cannot be written.
        """
        file = open(self.path, "a+")  # noqa: SIM115
        deadline: float | None = None
        while not _lock(file):
            file.seek(0)
            words = file.read().split()
            holder = f" (process {words[1]} on {words[0]})" if len(words) == 3 else ""
            elsewhere = bool(holder) and words[0] != self._host
            if elsewhere and deadline is None:
                deadline = self._clock() + LEASE
                say(
                    f"--output-dir {self.path.parent} is locked by another host{holder}; if that "
                    f"one has died, its lock ends within two minutes: waiting"
                )
            if deadline is None or not elsewhere or self._clock() >= deadline:
                file.close()
                raise UserError(
                    f"--output-dir {self.path.parent} is being written by another run{holder}; "
                    "wait until that has ended, or choose another folder"
                )
            self._sleep(_PAUSE)
        self._file = file
        file.truncate(0)
        file.write(self.mark)
        file.flush()
        os.fsync(file.fileno())

    def release(self) -> None:
        """Let other runs write there."""
        if self._file is not None:
            self._file.close()


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

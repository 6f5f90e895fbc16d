"""Processes that end with their parent, also when that is killed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Let the kernel kill this process when its parent ends, even if this one is stopped.

    Linux only; elsewhere it does nothing. Call it in a process that a parent's main thread has
    started: the kernel takes the end of that thread for the parent's.

    Args:
        parent: number of the parent process.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it was gone before
            os._exit(1)


def _status(process: int) -> tuple[str, int] | None:
    """Return a process's state (``T``: stopped) and its parent; None: there is none."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        # The name, in brackets, may hold anything.
        words = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()
        return words[0].decode(), int(words[1])
    return None


def lives(process: int) -> bool:
    """Tell whether a process exists and has not ended; True where unknown."""
    status = _status(process)
    return not os.path.isdir("/proc") if status is None else status[0] != "Z"


def _processes() -> list[int]:
    names = os.listdir("/proc") if os.path.isdir("/proc") else ()
    return [int(name) for name in names if name.isdigit()]


def session(leader: int) -> list[int]:
    """List the living processes of a session."""
    found = []
    for process in _processes():
        with contextlib.suppress(OSError):
            if os.getsid(process) == leader and lives(process):
                found.append(process)
    return found


def parent_of(process: int) -> int | None:
    """Return a process's parent; None: there is no such process."""
    if process == os.getpid():
        return os.getppid()
    status = _status(process)
    return None if status is None else status[1]


def children(state: str = "") -> list[tuple[int, str]]:
    """List child processes of this one, in any of these states if given, with their states."""
    every = ((process, _status(process)) for process in _processes())
    mine = [(process, of[0]) for process, of in every if of is not None and of[1] == os.getpid()]
    return sorted(pair for pair in mine if not state or pair[1] in state)

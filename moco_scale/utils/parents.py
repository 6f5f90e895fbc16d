"""Processes end with the one that has started them, also when that one is killed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from moco_scale.distributed.launchers import has_launcher, started_by_deepspeed
from moco_scale.utils.log import say

STARTER = "MOCO_SCALE_STARTER"
"""Variable that names a process, above any launcher, without which a program is to end."""
_PR_SET_PDEATHSIG = 1
_LOOK_SECONDS = 1.0


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, even if this one is stopped.

    Linux only; elsewhere it does nothing. To be called in a process that a parent's main thread
    has started: the kernel takes the end of that thread for the parent's.

    Args:
        parent: number of the process that has started this one.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it was gone before
            os._exit(1)


def _end_now(why: str) -> None:
    say(why)
    os.kill(os.getpid(), signal.SIGTERM)


_told: Callable[[str], None] = _end_now


@contextlib.contextmanager
def told_instead(told: Callable[[str], None]) -> Iterator[None]:
    """Within, `told` is called by a thread when the launcher is gone; else the process ends."""
    global _told
    before, _told = _told, told
    try:
        yield
    finally:
        _told = before


def leave_with_launcher(environ: Mapping[str, str]) -> None:
    """End this process, in an orderly way where there is one, when its launcher is gone.

    Only of one that a launcher has started, or a program that says so in :data:`STARTER`: ``nohup
    python train.py &`` outlives its shell. deepspeed's processes are started by its second program,
    which does not end with the first.
    """
    watched: dict[int, int | None] = {}
    if environ.get(STARTER, "").isdigit():
        watched[int(environ[STARTER])] = None
    if has_launcher(environ):
        parent = os.getppid()
        watched[parent] = os.getpid()
        if started_by_deepspeed(environ) and (grandparent := _parent_of(parent)):
            watched[grandparent] = parent
    if not watched:
        return
    threading.Thread(target=_watch, args=(watched,), name="launcher", daemon=True).start()


def _watch(watched: dict[int, int | None]) -> None:
    """watched: processes, and for each the child of which it has to stay the parent, if any."""
    while True:
        time.sleep(_LOOK_SECONDS)
        for parent, child in watched.items():
            if not _lives(parent) if child is None else _parent_of(child) != parent:
                _told(f"the launcher (process {parent}) is gone")
                return


def _status(process: int) -> tuple[str, int] | None:
    """State of a process, as Linux has it (``T``: stopped), and its parent; None: there is none."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        # The name, in brackets, may hold anything.
        words = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()
        return words[0].decode(), int(words[1])
    return None


def _lives(process: int) -> bool:
    status = _status(process)
    return not os.path.isdir("/proc") if status is None else status[0] != "Z"


def _processes() -> list[int]:
    names = os.listdir("/proc") if os.path.isdir("/proc") else ()
    return [int(name) for name in names if name.isdigit()]


def session(leader: int) -> list[int]:
    """Numbers of the living processes of a session."""
    found = []
    for process in _processes():
        with contextlib.suppress(OSError):
            if os.getsid(process) == leader and _lives(process):
                found.append(process)
    return found


def _parent_of(process: int) -> int | None:
    """Number of a process's parent; None: there is no such process."""
    if process == os.getpid():
        return os.getppid()
    status = _status(process)
    return None if status is None else status[1]


def children(state: str = "") -> list[tuple[int, str]]:
    """Processes that this one has started, with their states; only those in one of `state`."""
    every = ((process, _status(process)) for process in _processes())
    mine = [(process, of[0]) for process, of in every if of is not None and of[1] == os.getpid()]
    return sorted(pair for pair in mine if not state or pair[1] in state)

"""Orderly end of a process when its launcher is gone."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping

from moco_scale.distributed.launchers import has_launcher, started_by_deepspeed
from moco_scale.utils.log import log
from moco_scale.utils.parents import lives, parent_of

STARTER = "MOCO_SCALE_STARTER"
"""Variable that names a process, above any launcher, without which a program is to end."""


_LOOK_SECONDS = 1.0


def _end_now(why: str) -> None:
    log.error(why)
    os.kill(os.getpid(), signal.SIGTERM)


_told: Callable[[str], None] = _end_now


@contextlib.contextmanager
def told_instead(told: Callable[[str], None]) -> Iterator[None]:
    """Call `told` from a thread when the launcher is gone, instead of ending the process."""
    global _told
    before, _told = _told, told
    try:
        yield
    finally:
        _told = before


def leave_with_launcher(environ: Mapping[str, str]) -> None:
    """End this process, orderly where possible, when its launcher is gone.

    It applies only to processes of a launcher, or of a program that sets :data:`STARTER`: ``nohup
    python train.py &`` outlives its shell. deepspeed's processes are started by its second program,
    which does not end with the first.
    """
    watched: dict[int, int | None] = {}
    if environ.get(STARTER, "").isdigit():
        watched[int(environ[STARTER])] = None
    if has_launcher(environ):
        parent = os.getppid()
        watched[parent] = os.getpid()
        if started_by_deepspeed(environ) and (grandparent := parent_of(parent)):
            watched[grandparent] = parent
    if not watched:
        return
    threading.Thread(target=_watch, args=(watched,), name="launcher", daemon=True).start()


def _watch(watched: dict[int, int | None]) -> None:
    """watched: processes, and for each the child of which it has to stay the parent, if any."""
    while True:
        time.sleep(_LOOK_SECONDS)
        for parent, child in watched.items():
            if not lives(parent) if child is None else parent_of(child) != parent:
                _told(f"the launcher (process {parent}) is gone")
                return

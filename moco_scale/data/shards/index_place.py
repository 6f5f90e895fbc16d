"""Places of indexes made here, and scanning by one process for all.

Beside the tars, in ``.moco_scale-index/``, or where that is not writable in
``$XDG_CACHE_HOME/moco_scale/index/`` (``~/.cache`` by default; ``$MOCO_SCALE_CACHE`` takes
precedence).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from moco_scale.data.remote.shard_cache import cache_home
from moco_scale.utils import locks
from moco_scale.utils.errors import UserError
from moco_scale.utils.files import require_writable
from moco_scale.utils.log import log
from moco_scale.utils.own_folders import without_links
from moco_scale.utils.process_pool import BrokenProcessPool, core_count, in_order
from moco_scale.utils.progress import Progress, on_progress, progressed

FOLDER = ".moco_scale-index"
MOST_WORKERS = 32
_POLL = 0.2  # seconds between looks at a lock

Tar = TypeVar("Tar")
Found = TypeVar("Found")


def places(folder: Path) -> tuple[Path, Path]:
    """List the places for the tars of a folder: beside them, and the user's cache."""
    of = hashlib.blake2b(os.fsencode(os.path.abspath(folder)), digest_size=8).hexdigest()
    return folder / FOLDER, cache_home() / "index" / of


def first_writable(*folders: Path) -> Path | None:
    """Find the first folder in which a file can be made, and make it."""
    return next((folder for folder in folders if _can_write(folder)), None)


def _can_write(place: Path) -> bool:
    try:
        require_writable(place)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def alone(lock: Path, waiting: str, works_in: Path | None = None) -> Iterator[None]:
    """Take an exclusive lock, where the file system can lock.

    Elsewhere work may be done twice, and whole files replace each other. A waiter makes progress as
    long as the holder does, which shows by the lock's time of change, and by new files in the
    folder `works_in`.
    """
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            file = without_links(str(lock), os.O_CREAT | os.O_RDWR)
            held.callback(os.close, file)
            if not locks.try_lock(file):
                log.info(waiting)
                _lock_in_the_end(file, works_in)
            held.enter_context(on_progress(partial(_touch, file)))
        yield


def _touch(file: int) -> None:
    with contextlib.suppress(OSError):
        os.utime(file)


def _lock_in_the_end(file: int, works_in: Path | None) -> None:
    before: tuple[int, int] | None = None
    while True:
        time.sleep(_POLL)
        with contextlib.suppress(FileNotFoundError):
            files = -1 if works_in is None else works_in.stat().st_mtime_ns
            now = files, os.fstat(file).st_mtime_ns
            if before is not None and now != before:
                progressed()
            before = now
        if locks.try_lock(file):
            return


def read_tars(read: Callable[[Tar], Found], tars: Sequence[Tar], label: str) -> list[Found]:
    """Scan each tar by processes that share the work.

    Args:
        read: scans a tar.
        tars: arguments of `read`.
        label: of the progress bar: "indexing data".

    Raises:
        UserError: A process was killed, or `read` raised it.
    """
    workers = min(core_count(), MOST_WORKERS, -(-len(tars) // 4))
    found = []
    try:
        with Progress(label, len(tars), "shards") as progress:
            for _, result in in_order(read, tars, workers):
                found.append(result)
                progress.add(1)
    except BrokenProcessPool as error:
        raise UserError(f"{label}: a process was killed, probably for want of memory.") from error
    return found

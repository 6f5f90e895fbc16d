"""Worker process that reads for another: start, notice that nobody waits, orderly end."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sys
import traceback as tracebacks
from multiprocessing import queues
from types import TracebackType
from typing import Any

import torch
from torch.utils.data import get_worker_info

from moco_scale.utils.log import log
from moco_scale.utils.parents import die_with

_LIMITS = (errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.ENOMEM)
NOT_SENT = 100
"""Status of a worker that could not hand over a batch, plus the number of the system's error."""


class Flag:
    """Flag shared by processes: multiprocessing's ``Event`` without a lock.

    A process that is killed while it tests an ``Event`` keeps its lock, and the next test waits for
    ever.
    """

    def __init__(self) -> None:
        self._value = torch.zeros(1, dtype=torch.uint8).share_memory_()

    def set(self) -> None:
        """Raise the flag, for good."""
        self._value.fill_(1)

    def is_set(self) -> bool:
        """Tell whether some process has raised it."""
        return bool(self._value)


_no_longer: Flag | None = None  # in a worker: raised when its batches are not wanted any more


def closing() -> bool:
    """Tell whether nobody waits any more for this process, for waits that may be long."""
    parent = multiprocessing.parent_process()
    if get_worker_info() is None or parent is None:
        return False
    return not parent.is_alive() or (_no_longer is not None and _no_longer.is_set())


def set_up_worker(no_longer: Flag, parent: int | None, worker: int) -> None:
    """Let this process end with its parent, and not by the signals of its group.

    Args:
        no_longer: raised when nobody waits any more for this process.
        parent: number of the process whose main thread has started this one; None: another thread.
        worker: its number, unused.
    """
    global _no_longer
    _no_longer = no_longer
    if parent == os.getppid():  # not with a server between the two
        die_with(parent)
    queues.Queue._on_queue_feeder_error = staticmethod(_not_sent)  # type: ignore[attr-defined]
    # Whoever stops the run (Ctrl-C, Slurm) signals the whole group. The main process decides what
    # to do about it, and may want to finish its step; it ends the workers itself, and they end on
    # their own within seconds when it is gone.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)  # the main process's
    # torch would blame shared memory for every one of these; the main process knows better.
    signal.signal(signal.SIGBUS, signal.SIG_DFL)
    sys.excepthook = _report_unless_alone


def _not_sent(error: BaseException, batch: Any) -> None:
    """End this worker: the main process would wait for a batch that was lost on its way."""
    number = error.errno if isinstance(error, OSError) else None
    # torch raises RuntimeError, which has the system's words.
    number = number or next((n for n in _LIMITS if os.strerror(n) in str(error)), None)
    if number is None:
        log.error("".join(tracebacks.format_exception(error)))
    os._exit(NOT_SENT + min(number or errno.EIO, 100))


def _report_unless_alone(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Report errors of the thread that sends memory; others reach the main process.

    It fails when the main process is gone, which need not be reported by every worker.
    """
    if isinstance(error, OSError) and not isinstance(error, ConnectionError):
        _not_sent(error, None)
    if not isinstance(error, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, traceback)

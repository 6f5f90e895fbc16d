"""Orderly early end of a run: on a signal, or at a time limit.

A scheduler that takes a job's GPUs away sends SIGTERM, or SIGUSR1 some time before; one rank may
get it earlier than another, or as the only one. All ranks agree on the step after which they
stop, save a checkpoint, and exit with the status for "start the same command again".
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from contextlib import ExitStack
from types import FrameType
from typing import Any

import torch

from moco_scale.distributed import collectives
from moco_scale.distributed.launcher_watch import told_instead
from moco_scale.utils.errors import INTERRUPTED, LOST_PEER, STOPPED_EARLY
from moco_scale.utils.log import log
from moco_scale.utils.signals import ONE_SIGNAL, Listening, is_ignored

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
UNLESS_IGNORED = (signal.SIGHUP, signal.SIGINT)
"""Signals that ``nohup``, and shells for background jobs, make a program ignore."""
_TIME_IS_UP = 1 << 20  # above every signal's number
_READER_LOST = _TIME_IS_UP + 1
_NAMES = {_TIME_IS_UP: "--max-time is over", _READER_LOST: "a reader was killed"}


class StopRequest:
    """Collects reasons to stop on this rank, and agrees with the others once a step.

    Within the ``with`` block, which the main thread enters, the signals are caught. A second one
    ends the process at once, even while it waits for other ranks or a GPU. The end of the launcher
    counts as a signal too.

    Args:
        max_seconds: stop this long after `started`; 0: no limit.
        started: time.monotonic() when the run began.
    """

    def __init__(self, max_seconds: float, started: float) -> None:
        self._deadline = started + max_seconds if max_seconds else float("inf")
        self._signal = 0
        self._first: float | None = None
        self._listening = ExitStack()
        self._steps, self._looks = _LaterMax(), _LaterMax()

    def __enter__(self) -> StopRequest:
        numbers = [n for n in SIGNALS if not (n in UNLESS_IGNORED and is_ignored(n))]
        listening = Listening(dict.fromkeys(numbers, self._receive), self._count)
        self._listening.enter_context(told_instead(self._launcher_gone))
        listening.start()
        self._listening.callback(listening.stop)
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is None:
            self._steps.receive()
            self._looks.receive()
        if isinstance(exception[1], RuntimeError):
            return  # the launcher's signal may come before the error is printed
        self._listening.close()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._signal = self._signal or number

    def _count(self, number: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first, self._signal = now, self._signal or number
            if collectives.is_main():
                log.info(
                    f"{signal.Signals(number).name}: this run stops after the step under way and "
                    f"saves; a second signal, from {ONE_SIGNAL:g} s on, ends it at once and unsaved"
                )
        elif now - self._first > ONE_SIGNAL:
            _end_by(number)

    def _launcher_gone(self, why: str) -> None:
        if not self._signal:
            log.info(f"{why}: rank {collectives.rank()} stops after the step under way and saves")
            self._signal = signal.SIGTERM

    def reader_lost(self) -> None:
        """Request a stop because a reader process of this rank was killed."""
        self._signal = _READER_LOST

    def agree(self, *codes: int) -> tuple[str | None, list[int]]:
        """Exchange reasons and codes; every rank calls it after each step.

        The ranks compare the values of one step ago, so that nobody waits for the answer.

        Args:
            codes: numbers of this rank's, not negative.

        Returns:
            Why all ranks stop after this step, or None; and the largest codes of all ranks.
        """
        known, *largest = self._steps.exchange(self._reason(), *codes)
        return _name(known), largest

    def look(self) -> str | None:
        """Exchange reasons between the batches of an evaluation."""
        return _name(self._looks.exchange(self._reason())[0])

    def _reason(self) -> int:
        return _TIME_IS_UP if time.monotonic() > self._deadline else self._signal


class _LaterMax:
    """Maxima over all ranks, received at the next exchange; at once in a single process."""

    def __init__(self) -> None:
        self._pending: tuple[torch.Tensor, Any] | None = None

    def exchange(self, *mine: int) -> list[int]:
        """Return the maxima of the last exchange, first zeros, and start another; all call it."""
        known = self.receive() or [0] * len(mine)
        numbers = torch.tensor(mine, dtype=torch.int64)  # on the CPU: no GPU is waited for
        self._pending = (numbers, collectives.start_max(numbers))
        if collectives.world_size() == 1:
            known = self.receive()
        return known

    def receive(self) -> list[int]:
        """Wait for the exchange under way and return its maxima, if there is one."""
        if self._pending is None:
            return []
        numbers, work = self._pending
        self._pending = None
        if work is not None:
            work.wait()
        return [int(number) for number in numbers]


def _end_by(number: int) -> None:
    """End this process as an uncaught signal does; from any thread."""
    # Python changes handlers in the main thread only, which may be stuck.
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    libc.signal(number, None)  # SIG_DFL
    os.kill(os.getpid(), number)


def _name(known: int) -> str | None:
    if not known:
        return None
    return _NAMES.get(known) or signal.Signals(known).name


def status_of(reason: str) -> int:
    """Exit status of a run that has stopped for a reason, once it is saved.

    A launcher must not restart a run after Ctrl-C, and only so often after a reader's end.
    """
    own = {"SIGINT": INTERRUPTED, _NAMES[_READER_LOST]: LOST_PEER}
    return own.get(reason, STOPPED_EARLY)

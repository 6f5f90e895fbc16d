"""Ending a run early in an orderly way: on a signal, or before a time limit.

A scheduler that takes a job's GPUs away sends SIGTERM, or SIGUSR1 some time before; one rank may
get it earlier than another, or alone. All ranks agree on the step after which they stop, save a
checkpoint, and leave with a status that says: start the same command again.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch

from moco_scale import distributed

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
ONE_SIGNAL = 2.0
"""Seconds within which signals count as one: launchers pass on what the whole group got too."""
_TIME_IS_UP = 1 << 20  # above every signal's number
_NO_MORE = 0  # in the place of a signal's number


class StopRequest:
    """Collects reasons to stop on this rank, and agrees with the others once a step.

    Within the ``with`` block, which the main thread enters, the signals are caught; a second one
    ends the process at once, as it would have without, even while it waits for other ranks or a
    GPU: a handler in Python would only run when that is over, so a thread counts them.

    Args:
        max_seconds: stop this long after `started`; 0: no limit.
        started: time.monotonic() when the run began.
    """

    def __init__(self, max_seconds: float, started: float) -> None:
        self._deadline = started + max_seconds if max_seconds else float("inf")
        self._signal = 0
        self._before: dict[int, Any] = {}
        self._wakeup = self._wakeup_before = -1
        self._steps, self._looks = _LaterMax(), _LaterMax()

    def __enter__(self) -> StopRequest:
        arrivals, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        threading.Thread(target=self._count, args=(arrivals,), name="signals", daemon=True).start()
        # Written to by the C library's own handler, whatever the main thread is doing.
        self._wakeup_before = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is None:
            self._steps.settle()
            self._looks.settle()
        if isinstance(exception[1], RuntimeError):
            return  # the launcher's signal may come before what is wrong has been said
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.write(self._wakeup, bytes([_NO_MORE]))
        os.close(self._wakeup)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._signal = self._signal or number

    def _count(self, arrivals: int) -> None:
        first: float | None = None
        while True:
            for number in os.read(arrivals, 64):
                if number == _NO_MORE:
                    os.close(arrivals)
                    return
                if number not in SIGNALS:
                    continue
                now = time.monotonic()
                if first is None:
                    first, self._signal = now, self._signal or number
                elif now - first > ONE_SIGNAL:
                    _end_by(number)

    def agree(self, *codes: int) -> tuple[str | None, list[int]]:
        """Each rank calls it after each step.

        The ranks compare what each knew a step ago, so that nobody waits for the answer.

        Args:
            codes: numbers of this rank's, not negative.

        Returns:
            Why all ranks stop after this step, or None; and the largest codes of all ranks.
        """
        known, *largest = self._steps.exchange(self._reason(), *codes)
        return _name(known), largest

    def look(self) -> str | None:
        """The same between the batches of an evaluation, without codes."""
        return _name(self._looks.exchange(self._reason())[0])

    def _reason(self) -> int:
        return _TIME_IS_UP if time.monotonic() > self._deadline else self._signal


class _LaterMax:
    """The largest numbers of all ranks, told at the next exchange; at once in a single process."""

    def __init__(self) -> None:
        self._pending: tuple[torch.Tensor, Any] | None = None

    def exchange(self, *mine: int) -> list[int]:
        """What the ranks gave the last time, zeros the first time; all ranks call it."""
        known = self.settle() or [0] * len(mine)
        numbers = torch.tensor(mine, dtype=torch.int64)  # on the CPU: no GPU is waited for
        self._pending = (numbers, distributed.start_max(numbers))
        if distributed.world_size() == 1:
            known = self.settle()
        return known

    def settle(self) -> list[int]:
        """What is under way, once it is there; nothing of it is left behind."""
        if self._pending is None:
            return []
        numbers, work = self._pending
        self._pending = None
        if work is not None:
            work.wait()
        return [int(number) for number in numbers]


def _end_by(number: int) -> None:
    """End this process as a signal does that nobody catches; from any thread."""
    # Python lets the main thread alone change a handler, and that one may never come back.
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    libc.signal(number, None)  # SIG_DFL
    os.kill(os.getpid(), number)


def _name(known: int) -> str | None:
    if not known:
        return None
    return "--max-time is over" if known == _TIME_IS_UP else signal.Signals(known).name

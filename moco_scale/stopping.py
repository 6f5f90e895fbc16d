"""Ending a run early in an orderly way: on a signal, or before a time limit.

A scheduler that takes a job's GPUs away sends SIGTERM, or SIGUSR1 some time before; one rank may
get it earlier than another, or alone. All ranks agree on the step after which they stop, save a
checkpoint, and leave with a status that says: start the same command again.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

import torch

from moco_scale import distributed

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
ONE_SIGNAL = 2.0
"""Seconds within which signals count as one: launchers pass on what the whole group got too."""
_TIME_IS_UP = 1 << 20  # above every signal's number


class StopRequest:
    """Collects reasons to stop on this rank, and agrees with the others once a step.

    Within the ``with`` block the signals are caught; a second one ends the process at once, as it
    would have without.

    Args:
        max_seconds: stop this long after `started`; 0: no limit.
        started: time.monotonic() when the run began.
    """

    def __init__(self, max_seconds: float, started: float) -> None:
        self._deadline = started + max_seconds if max_seconds else float("inf")
        self._signal, self._signal_time = 0, 0.0
        self._before: dict[int, Any] = {}
        self._pending: tuple[torch.Tensor, Any] | None = None

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pending is not None and exception[0] is None:
            self._agreed()
        if isinstance(exception[1], RuntimeError):
            return  # the launcher's signal may come before what is wrong has been said
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signal and now - self._signal_time > ONE_SIGNAL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self._signal:
            self._signal, self._signal_time = number, now

    def agree(self, code: int = 0) -> tuple[str | None, int]:
        """Each rank calls it after each step.

        The ranks compare what each knew a step ago, so that nobody waits for the answer.

        Args:
            code: a number of this rank's, not negative.

        Returns:
            Why all ranks stop after this step, or None; and the largest code of all ranks.
        """
        known = self._agreed() if self._pending is not None else (0, 0)
        mine = _TIME_IS_UP if time.monotonic() > self._deadline else self._signal
        flags = torch.tensor([mine, code], dtype=torch.int64)  # on the CPU: no GPU is waited for
        self._pending = (flags, distributed.start_max(flags))
        if distributed.world_size() == 1:
            known = self._agreed()
        return _name(known[0]), known[1]

    def _agreed(self) -> tuple[int, int]:
        assert self._pending is not None
        flags, work = self._pending
        self._pending = None
        if work is not None:
            work.wait()
        reason, code = flags.tolist()
        return reason, code


def _name(known: int) -> str | None:
    if not known:
        return None
    return "--max-time is over" if known == _TIME_IS_UP else signal.Signals(known).name

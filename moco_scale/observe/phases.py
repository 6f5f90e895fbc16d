"""Phases of a run: the position of this process at any moment, and its time in each."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch

START, DATA, SHUFFLE, FORWARD, QUEUE = "start", "data", "shuffle", "forward", "queue"
BACKWARD, SUMMING, UPDATE, EMA = "backward", "backward: sum over ranks", "update", "EMA"
AGREE, LOG, EVALUATION, SAVE, FINISH = "agree", "log", "evaluation", "save", "finish"

STEP_PHASES = (DATA, SHUFFLE, FORWARD, QUEUE, BACKWARD, SUMMING, UPDATE, EMA, AGREE)
"""Phases of a training step; the time in them is the time of the step."""
PHASES = (START, *STEP_PHASES, LOG, EVALUATION, SAVE, FINISH)


class Position(NamedTuple):
    """Place in the run, the same on all ranks when they are equally far.

    Attributes:
        step: number of the step under way, from 1; 0 before the first.
        entry: phases entered since that step began.
        phase: of :data:`PHASES`.
        since: when it was entered, on this process's clock.
    """

    step: int
    entry: int
    phase: str
    since: float


class Phases:
    """Current phase of this process, and the time it has spent in each.

    Entering one costs about a microsecond and waits for nothing; another thread may read
    :attr:`now` at any moment.

    Args:
        clock: seconds.

    Attributes:
        now: position of this process.
        device: the same on the GPU, if there is one.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._spent = dict.fromkeys(PHASES, 0.0)
        self.now = Position(0, 0, START, clock())
        self._steps = 0
        self.device = DeviceTimeline() if torch.cuda.is_initialized() else None

    def enter(self, phase: str, step: int | None = None) -> None:
        """Enter a phase, and a new step where one is given."""
        now, before = self._clock(), self.now
        self._spent[before.phase] += now - before.since
        if step is None or step == before.step:
            self.now = Position(before.step, before.entry + 1, phase, now)
        else:
            self.now = Position(step, 0, phase, now)
            self._steps += 1
        if self.device is not None:
            self.device.mark(self.now)

    @property
    def steady(self) -> bool:
        """False in slow phases: before the third step, evaluation, save, finish."""
        # The first steps compile, and choose and load what they run.
        return self._steps > 2 and self.now.phase in (*STEP_PHASES, LOG)

    def spent(self) -> dict[str, float]:
        """Return seconds in each phase since :meth:`restart`, the one under way included."""
        now = self._clock()
        return self._spent | {self.now.phase: self._spent[self.now.phase] + now - self.now.since}

    def worked(self) -> dict[str, float]:
        """Return the same by the GPU's clock where there is one.

        A process queues GPU work ahead of time, so waits show on the GPU.
        """
        return self.spent() if self.device is None else self.device.spent()

    def restart(self) -> None:
        """Reset the times of all phases."""
        self._spent = dict.fromkeys(PHASES, 0.0)
        self.now = self.now._replace(since=self._clock())
        if self.device is not None:
            self.device.restart()


class DeviceTimeline:
    """Phases as the GPU reaches them: an event for each, queried later, never waited for."""

    def __init__(self) -> None:
        self._marks: deque[tuple[Position, torch.cuda.Event]] = deque()
        self._spare: list[torch.cuda.Event] = []
        self._spent = dict.fromkeys(PHASES, 0.0)

    def mark(self, position: Position) -> None:
        """Count GPU work queued from here on towards this position."""
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((position, event))
        if position.entry == 0:
            self._fold()

    def _fold(self) -> None:
        """Add up the phases that the GPU has finished."""
        while len(self._marks) > 1 and self._marks[1][1].query():
            (position, begin), (_, end) = self._marks[0], self._marks[1]
            self._spent[position.phase] += begin.elapsed_time(end) / 1000
            self._marks.popleft()
            self._spare.append(begin)

    def spent(self) -> dict[str, float]:
        """Return seconds in each phase since :meth:`restart`."""
        self._fold()
        return dict(self._spent)

    def restart(self) -> None:
        """Count from the phase that the GPU is in now."""
        self._fold()
        self._spent = dict.fromkeys(PHASES, 0.0)

    def where(self) -> Position | None:
        """Return the last position that the GPU has reached; called from the watchdog's thread."""
        try:
            marks = list(self._marks)
        except RuntimeError:  # the run's thread has just added one: it is not standing still
            return None
        reached = [position for position, event in marks if event.query()]
        return reached[-1] if reached else (marks[0][0] if marks else None)

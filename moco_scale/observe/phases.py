"""Where a process stands, at any moment, and what it spends its time on."""

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
"""The phases of a training step; the time in them is the time of the step."""
PHASES = (START, *STEP_PHASES, LOG, EVALUATION, SAVE, FINISH)


class Position(NamedTuple):
    """A place in the run, the same on all ranks when they are equally far.

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
    """The phase this process is in, and the time it has spent in each.

    To enter one costs about a microsecond and waits for nothing; another thread may read
    :attr:`now` at any moment.

    Args:
        clock: seconds.

    Attributes:
        now: where this process stands.
        device: the same on the GPU, if there is one.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._spent = dict.fromkeys(PHASES, 0.0)
        self.now = Position(0, 0, START, clock())
        self._steps = 0
        self.device = DeviceTimeline() if torch.cuda.is_initialized() else None

    def enter(self, phase: str, step: int | None = None) -> None:
        """From here on, this process is in a phase, and in a new step where one is given."""
        now, before = self._clock(), self.now
        self._spent[before.phase] += now - before.since
        if step is None or step == before.step:
            self.now = Position(before.step, before.entry + 1, phase, now)
        else:
            self.now = Position(step, 0, phase, now)
            self._steps += 1
        if self.device is not None:
            self.device.mark(self.now)

    def alive(self) -> None:
        """This process gets on, within the phase that it is in."""
        self.now = self.now._replace()

    @property
    def steady(self) -> bool:
        """False where a phase may take long: before the third step, evaluating, saving, ending."""
        # The first steps compile, and choose and load what they run.
        return self._steps > 2 and self.now.phase in (*STEP_PHASES, LOG)

    def spent(self) -> dict[str, float]:
        """Seconds of this process in each phase since :meth:`restart`, the one under way too."""
        now = self._clock()
        return self._spent | {self.now.phase: self._spent[self.now.phase] + now - self.now.since}

    def worked(self) -> dict[str, float]:
        """The same on the GPU's own clock, up to what it has done; of the process without one.

        A process hands work to a GPU ahead of time, so what it waits for is seen there.
        """
        return self.spent() if self.device is None else self.device.spent()

    def restart(self) -> None:
        """Count from now on."""
        self._spent = dict.fromkeys(PHASES, 0.0)
        self.now = self.now._replace(since=self._clock())
        if self.device is not None:
            self.device.restart()


class DeviceTimeline:
    """Phases as the GPU comes to them: an event for each, looked at later, never waited for."""

    def __init__(self) -> None:
        self._marks: deque[tuple[Position, torch.cuda.Event]] = deque()
        self._spare: list[torch.cuda.Event] = []
        self._spent = dict.fromkeys(PHASES, 0.0)

    def mark(self, position: Position) -> None:
        """What is given to the GPU from here on belongs to this position."""
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((position, event))
        if position.entry == 0:
            self._fold()

    def _fold(self) -> None:
        """Add up the phases that the GPU has left behind."""
        while len(self._marks) > 1 and self._marks[1][1].query():
            (position, begin), (_, end) = self._marks[0], self._marks[1]
            self._spent[position.phase] += begin.elapsed_time(end) / 1000
            self._marks.popleft()
            self._spare.append(begin)

    def spent(self) -> dict[str, float]:
        """Seconds in each phase since :meth:`restart`."""
        self._fold()
        return dict(self._spent)

    def restart(self) -> None:
        """Count from the phase that the GPU is in now."""
        self._fold()
        self._spent = dict.fromkeys(PHASES, 0.0)

    def where(self) -> Position | None:
        """The last position that the GPU has come to; for another thread than the run's own."""
        try:
            marks = list(self._marks)
        except RuntimeError:  # the run's thread has just added one: it is not standing still
            return None
        reached = [position for position, event in marks if event.query()]
        return reached[-1] if reached else (marks[0][0] if marks else None)

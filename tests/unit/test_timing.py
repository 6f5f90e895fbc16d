"""Where a process stands and what it spends its time on."""

import pytest
import torch

from moco_scale.observe.phases import (
    DATA,
    FORWARD,
    LOG,
    PHASES,
    SHUFFLE,
    START,
    DeviceTimeline,
    Phases,
    Position,
)


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_time_is_counted_in_the_phase_it_passes_in() -> None:
    clock = Clock()
    phases = Phases(clock)
    assert phases.now == (0, 0, START, 0.0)
    for phase, step, end in (
        (DATA, 1, 3.0),
        (SHUFFLE, None, 4.0),
        (DATA, 2, 6.5),
        (LOG, None, 7.0),
    ):
        phases.enter(phase, step)
        clock.now = end
    assert phases.now[:3] == (2, 1, LOG)
    assert phases.spent() == dict.fromkeys(PHASES, 0.0) | {DATA: 5.5, SHUFFLE: 1.0, LOG: 0.5}
    assert phases.worked() == phases.spent()


def test_to_restart_forgets_and_keeps_the_phase() -> None:
    clock = Clock()
    phases = Phases(clock)
    phases.enter(FORWARD, 7)
    clock.now = 2.0
    phases.restart()
    assert phases.now[:3] == (7, 0, FORWARD)
    clock.now = 2.5
    assert phases.spent() == dict.fromkeys(PHASES, 0.0) | {FORWARD: 0.5}


def test_the_same_steps_give_the_same_positions() -> None:
    """That is what makes two ranks comparable."""
    one, other = Phases(), Phases()
    for phases in (one, other):
        for step in (1, 2):
            for phase in (DATA, SHUFFLE, FORWARD, SHUFFLE):
                phases.enter(phase, step if phase == DATA else None)
    assert one.now[:3] == other.now[:3] == (2, 3, SHUFFLE)


class Gpu:
    """One that does what it is given when it is told to, and its events.

    Attributes:
        done: how many of the events that were recorded it has come to.
        made: events in all.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.recorded = self.done = self.made = 0
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                assert enable_timing
                gpu.made += 1

            def record(self) -> None:
                gpu.recorded += 1
                self.number = gpu.recorded

            def query(self) -> bool:
                return self.number <= gpu.done

            def elapsed_time(self, end: "Event") -> float:
                assert self.query() and end.query(), "the real one raises"
                return 1000.0 * (end.number - self.number)  # a second between events

        patch.setattr(torch.cuda, "Event", Event)


def at(step: int, entry: int, phase: str) -> Position:
    return Position(step, entry, phase, 0.0)


def test_a_gpu_s_phases_are_counted_as_it_comes_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, places = Gpu(monkeypatch), [at(1, 0, DATA), at(1, 1, SHUFFLE), at(1, 2, FORWARD)]
    timeline = DeviceTimeline()
    assert timeline.where() is None
    for place in places:
        timeline.mark(place)
    assert timeline.where() == places[0]  # it has not begun
    assert timeline.spent() == dict.fromkeys(PHASES, 0.0)
    gpu.done = 2
    assert timeline.where() == places[1]
    assert timeline.spent() == dict.fromkeys(PHASES, 0.0) | {DATA: 1.0}
    gpu.done = 3
    assert timeline.where() == places[2]
    # The last phase has no end yet.
    assert timeline.spent() == dict.fromkeys(PHASES, 0.0) | {DATA: 1.0, SHUFFLE: 1.0}
    timeline.restart()
    timeline.mark(at(2, 0, DATA))
    gpu.done = 4
    assert timeline.spent() == dict.fromkeys(PHASES, 0.0) | {FORWARD: 1.0}


def test_a_gpu_s_events_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their number is that of the marks it lags behind, not of the steps of a run."""
    gpu, timeline = Gpu(monkeypatch), DeviceTimeline()
    for step in range(1, 101):
        for entry, phase in enumerate((DATA, SHUFFLE, FORWARD)):
            timeline.mark(at(step, entry, phase))
            gpu.done = max(gpu.recorded - 4, 0)
    assert gpu.made <= 10
    gpu.done = gpu.recorded
    spent = timeline.spent()
    assert (spent[DATA], spent[SHUFFLE], spent[FORWARD]) == (100.0, 100.0, 99.0)


def test_work_is_that_of_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, clock = Gpu(monkeypatch), Clock()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    phases = Phases(clock)
    for phase, step in ((DATA, 1), (FORWARD, None), (DATA, 2)):
        phases.enter(phase, step)
        clock.now += 0.001  # handed over, not done
    assert phases.device is not None
    assert phases.device.where() == phases.now._replace(step=1, entry=0, since=0.0)
    gpu.done = 3
    assert phases.worked() == dict.fromkeys(PHASES, 0.0) | {DATA: 1.0, FORWARD: 1.0}
    assert phases.spent()[FORWARD] == pytest.approx(0.001)
    phases.restart()
    assert phases.worked() == dict.fromkeys(PHASES, 0.0)

"""Where a process stands and what it spends its time on."""

from moco_scale.timing import DATA, FORWARD, LOG, PHASES, SHUFFLE, START, Phases


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

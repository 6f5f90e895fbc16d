"""Who keeps the others waiting is named, when it goes on for a while."""

from typing import Any

import pytest
from harness import run_ranks

from moco_scale.distributed import collectives
from moco_scale.observe.phases import AGREE, DATA, FORWARD, PHASES, SHUFFLE, Phases
from moco_scale.observe.stragglers import PERSISTS, StepTimes


class Spent(Phases):
    """Phases that have taken what is said, not what they took."""

    def __init__(self, **seconds: float) -> None:
        super().__init__()
        self.seconds = dict.fromkeys(PHASES, 0.0) | seconds

    def worked(self) -> dict[str, float]:
        return self.seconds


def reports(slow: int, phase: str, times: list[float]) -> list[tuple[dict[str, float], list[str]]]:
    """Reports over two steps each, in which one rank spends so many more seconds in a phase."""
    step_times, results = StepTimes(), []
    for more in times:
        seconds = {DATA: 0.2, FORWARD: 2.0, SHUFFLE: 0.0, AGREE: 0.1}
        # All ranks take equally long: who does not work waits.
        seconds[phase if collectives.rank() == slow else SHUFFLE] += more
        results.append(step_times.gather(Spent(**seconds), 2))
    return results


@pytest.mark.parametrize("phase", [DATA, FORWARD])
def test_a_straggler(phase: str) -> None:
    slow, quick = 1.0, 0.0
    times = [slow] * (PERSISTS + 1) + [quick] + [slow] * (PERSISTS - 1) + [quick]
    others: Any
    main, *others = run_ranks(reports, 3, 2, phase, times)
    assert others == [[({}, [])] * len(times)] * 2
    record, _ = main[0]
    assert record == pytest.approx(
        {
            "step_seconds_min": 1.65,
            "step_seconds_median": 1.65,
            "step_seconds_max": 1.65,
            "data_wait_seconds_min": 0.1,
            "data_wait_seconds_median": 0.1,
            "data_wait_seconds_max": 0.6 if phase == DATA else 0.1,
            "communication_wait_seconds_min": 0.05,
            "communication_wait_seconds_median": 0.55,
            "communication_wait_seconds_max": 0.55,
            "slowest_rank": 2,
            "slowest_ratio": 1.6 / 1.1,
        }
    )
    quick_text, slow_text = ("0.100", "0.600") if phase == DATA else ("1.000", "1.500")
    said = {report: lines for report, (_, lines) in enumerate(main) if lines}
    assert list(said) == [PERSISTS - 1, PERSISTS + 1]
    (begins,), (ends,) = said.values()
    assert begins.startswith("rank 2 on ")
    assert begins.endswith(
        " keeps the others waiting: 1.600 s of work of its own a step, 1.5 times the median; "
        f"longer in {phase}, {slow_text} s against {quick_text} s"
    )
    assert ends.startswith("rank 2 on ")
    assert ends.endswith(" no longer keeps the others waiting")


def test_of_two_ranks_the_one_that_works_is_the_straggler() -> None:
    (main, _) = run_ranks(reports, 2, 0, FORWARD, [1.0] * PERSISTS)
    assert main[-1][1][0].startswith("rank 0 on ")
    assert main[-1][0]["slowest_rank"] == 0

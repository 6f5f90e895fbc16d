"""A rank that is killed, frozen or stuck: every other says which and where, and ends."""

import os
import re
import signal
import time
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
import pytest
from commands import TINY, Ranks, forked_ranks

from moco_scale.errors import LOST_PEER

pytestmark = pytest.mark.timeout(1800)

HOST = os.uname().nodename


def break_at(step: int, phase: str, rank: int, how: str) -> None:
    """Let one rank come to harm as soon as it has entered a phase of a step."""
    from moco_scale.timing import Phases, Position
    from moco_scale.watchdog import Watch

    enter, beat = Phases.enter, Watch._beat
    told: list[Position] = []

    def beat_and_note(self: Watch) -> None:
        told.append(self._phases.now)
        beat(self)

    def enter_and_break(self: Phases, entered: str, number: int | None = None) -> None:
        enter(self, entered, number)
        here = self.now.step == step and entered == phase
        if here and int(os.environ["RANK"]) == rank:
            while not any(p.step == step and p.phase == phase for p in told[:-1]):
                time.sleep(0.01)  # until others can know
            if how == "stuck":
                time.sleep(1e6)
            elif how == "error":
                raise ZeroDivisionError("a defect of one rank")
            os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)

    Phases.enter = enter_and_break  # type: ignore[method-assign, assignment]
    Watch._beat = beat_and_note  # type: ignore[method-assign]


def job(data: Path, out: Path, *how: object, ranks: int = 2) -> AbstractContextManager[Ranks]:
    flags = (*TINY, "--hang-timeout", 6, "--data-dir", data, "--output-dir", out)
    return forked_ranks(*flags, ranks=ranks, prepare=break_at, prepare_args=how)


def said(run: Ranks, rank: int) -> str:
    """The line in which a rank says why it stops."""
    lines = re.findall(rf"^train\.py: rank {rank} on {HOST} stops.*$", run.output(), re.MULTILINE)
    assert len(lines) == 1, run.output()
    assert "Traceback" not in run.output()
    return lines[0]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank(tiny_shards: Path, tmp_path: Path, victim: int) -> None:
    with job(tiny_shards, tmp_path, 3, "forward", victim, "killed") as run:
        other = 1 - victim
        assert run.status(other) == LOST_PEER, run.output()
        assert run.status(victim) == -signal.SIGKILL
    line = said(run, other)
    assert "stops in phase shuffle of step 3: " in line
    assert f"rank {victim} on {HOST}" in line
    assert line.endswith("last was in phase forward of step 3"), line


@pytest.mark.parametrize("victim", [0, 1])
def test_a_frozen_rank(tiny_shards: Path, tmp_path: Path, victim: int) -> None:
    """Nothing breaks, and nothing comes: the time-out ends it. So it does when it thaws."""
    with job(tiny_shards, tmp_path, 4, "backward", victim, "frozen") as run:
        other = 1 - victim
        assert run.status(other) == LOST_PEER, run.output()
        frozen = psutil.Process(run.processes[victim].pid)
        assert frozen.status() == psutil.STATUS_STOPPED
        frozen.resume()
        assert run.status(victim) == LOST_PEER, run.output()
    line = said(run, other)
    assert "having stood in phase backward: sum over ranks of step 4 for 5 s" in line
    assert f"rank {victim} on {HOST}" in line
    assert line.endswith("last was in phase backward of step 4"), line
    said(run, victim)
    (folder,) = (tmp_path / "hangs").iterdir()
    report = (folder / f"rank-{other:05d}.txt").read_text()
    assert line in report
    assert "train_step" in report
    assert (folder / f"flight_rank_{other}").stat().st_size > 0


def test_a_rank_that_is_alive_and_stuck(tiny_shards: Path, tmp_path: Path) -> None:
    with job(tiny_shards, tmp_path, 3, "data", 1, "stuck") as run:
        assert [run.status(rank) for rank in (0, 1)] == [LOST_PEER, LOST_PEER], run.output()
    for rank in (0, 1):
        stands = rf"rank 1 on {HOST} stands in phase data of step 3 for \d+ s and is alive; "
        waits = "the others wait for it in phase shuffle of step 3"
        assert re.search(stands + waits, said(run, rank)), run.output()


def test_a_rank_that_ends_by_an_error_of_its_own(tiny_shards: Path, tmp_path: Path) -> None:
    with job(tiny_shards, tmp_path, 2, "EMA", 1, "error") as run:
        assert run.status(0) == LOST_PEER, run.output()
        assert run.status(1) not in (0, LOST_PEER)
    reason = "ZeroDivisionError('a defect of one rank')"
    assert f"rank 1 on {HOST} ended in phase EMA of step 2: {reason}" in run.output()

"""Watchdog threads of several ranks and their store, run in one process."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from moco_scale.distributed import collectives
from moco_scale.observe import watchdog
from moco_scale.observe.phases import DATA, EVALUATION, FORWARD, Phases
from moco_scale.observe.watchdog import Watch
from moco_scale.untrusted.store_message import Verdict


class Store:
    """Keys and values as in torch's store; counts what each rank reads."""

    def __init__(self, clock: "Clock") -> None:
        self.clock, self.values, self.asking = clock, dict[str, Any](), -1
        self.read: Counter[int] = Counter()
        self.latency = 0.0

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def add(self, key: str, amount: int) -> int:
        self.values[key] = self.values.get(key, 0) + amount
        return int(self.values[key])

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def get(self, key: str) -> bytes:
        return self.values[key].encode()

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.clock.now += self.latency
        self.read[self.asking] += len(keys)
        return [self.get(key) for key in keys]


class Clock:
    """Seconds, set by hand."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


class Job:
    """Ranks, four to a host, whose threads take turns, once in an interval."""

    def __init__(self, patch: pytest.MonkeyPatch, timeout: float, world: int = 8) -> None:
        self.clock = Clock()
        patch.setattr(watchdog.time, "monotonic", self.clock.monotonic)
        patch.setattr(collectives, "world_size", lambda: world)
        self.store = Store(self.clock)
        self.ended: dict[int, tuple[float, str]] = {}
        self.frozen: set[int] = set()
        self.watches = []
        for rank in range(world):
            patch.setattr(collectives, "rank", lambda rank=rank: rank)
            patch.setattr(collectives, "local_rank", lambda rank=rank: rank % 4)
            phases = Phases(self.clock.monotonic)
            for step in (1, 2, 3):
                phases.enter(DATA, step)
            watch = Watch(phases, timeout, Path("none"), "train.py")
            watch._store, watch._host = self.store, f"node{rank // 4}"
            watch._end = lambda text, rank=rank: self._end(rank, text)  # type: ignore[assignment, misc]
            self.watches.append(watch)

    def _end(self, rank: int, text: str) -> None:
        self.ended[rank] = self.clock.now, text
        verdict = Verdict(text=text, ended=False, at=0)
        self.store.values.setdefault("verdict", verdict.model_dump_json())

    def run(self, seconds: float) -> dict[int, tuple[float, str]]:
        """Let time pass; return when each rank ended, and why."""
        until = self.clock.now + seconds
        while self.clock.now < until:
            for rank, watch in enumerate(self.watches):
                if rank not in self.frozen and rank not in self.ended:
                    self.store.asking = rank
                    watch._talk()
                    watch._look()
            self.clock.now += self.watches[0]._interval
        return self.ended


def test_rank_0_reads_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(monkeypatch, 100.0)
    job.run(3)
    job.frozen = {5}
    ended = job.run(120)
    assert ended.keys() == set(range(8)) - {5}
    assert max(when for when, _ in ended.values()) <= 103
    (text,) = {text for _, text in ended.values()}
    assert text.startswith("rank 5 on node1 was last seen at")
    # Everybody looks at rank 0 in every round; it alone looks at all, from half the time on.
    rounds = 94
    assert all(job.store.read[rank] <= rounds + 1 for rank in range(1, 8))
    assert 40 * 8 <= job.store.read[0] <= rounds + 41 * 8


def test_where_rank_0_is_silent_the_first_of_a_host_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(monkeypatch, 100.0)
    job.run(3)
    job.frozen = {0, 6}
    ended = job.run(120)
    assert ended.keys() == set(range(8)) - {0, 6}
    assert max(when for when, _ in ended.values()) <= 105
    (text,) = {text for _, text in ended.values()}
    assert text.startswith("rank 0 on node0, rank 6 on node1 were last seen at")
    assert job.store.read[4] > 40 * 8
    assert all(job.store.read[rank] < 105 for rank in (1, 2, 3, 5, 7))


def test_rank_0_is_named_where_nobody_else_may_read(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(monkeypatch, 100.0, world=4)
    job.run(3)
    job.frozen = {0}
    ended = job.run(120)
    assert ended.keys() == {1, 2, 3}
    assert all("rank 0 on node0 was last seen at" in text for _, text in ended.values())
    assert max(when for when, _ in ended.values()) <= 105


def test_a_store_that_is_slow_makes_nobody_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a timeout of a few of its rounds: all stand still, and all are reported alive."""
    job = Job(monkeypatch, 20.0)
    job.store.latency = 3.0  # a round of all takes longer than 0.3 of the timeout
    ended = job.run(400)
    assert len(ended) == 8
    for _, text in ended.values():
        assert text.startswith("all ranks are alive and stand in phase data of step 3")


def test_many_ranks_have_time_for_their_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(monkeypatch, 6.0, world=2048)
    assert {(watch._interval, watch._timeout) for watch in job.watches} == {(5.12, 102.4)}
    job = Job(monkeypatch, 600.0, world=8)
    assert {(watch._interval, watch._timeout) for watch in job.watches} == {(1.0, 600.0)}


def test_an_alarm_of_another_makes_rank_0_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network tells rank 3 that some rank is gone; rank 0 gets on, on a GPU that is ahead."""
    job = Job(monkeypatch, 600.0)
    job.run(5)
    job.frozen = {7}
    job.watches[3]._alarm = True
    ended = job.run(20)
    assert ended.keys() == set(range(7))
    assert all("rank 7 on node1 was last seen at" in text for _, text in ended.values())


def test_ranks_that_wait_for_one_in_a_slow_phase_are_not_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = Job(monkeypatch, 100.0)
    for watch in job.watches:
        watch._phases.enter(EVALUATION)
    slow = collectives.slow_timeout(100.0)
    until = 2 * slow
    while job.clock.now < until:
        phases = job.watches[5]._phases  # it has more to encode than the others
        phases.now = phases.now._replace(since=job.clock.now)
        job.run(50)
    assert not job.ended
    ended = job.run(slow + 100)
    assert len(ended) == 8
    assert all("all ranks are alive and stand" in text for _, text in ended.values())


def test_a_step_is_not_waited_for_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(monkeypatch, 100.0)
    for rank, watch in enumerate(job.watches):
        if rank != 2:
            watch._phases.enter(FORWARD)
    ended = job.run(101)
    assert len(ended) == 8
    assert all(
        text.startswith("rank 2 on node0 stands in phase data of step 3")
        for _, text in ended.values()
    )


def test_a_process_on_its_own_is_watched_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no store; a step may take the timeout, what takes long by nature more."""
    job = Job(monkeypatch, 100.0, world=1)
    (watch,) = job.watches
    del watch._store
    watch._phases.enter(EVALUATION)
    for seconds, phase in (
        (collectives.slow_timeout(100.0) - 1, FORWARD),
        (99.0, DATA),
        (102.0, ""),
    ):
        while seconds > 0 and not job.ended:
            watch._look()
            job.clock.now += watch._interval
            seconds -= watch._interval
        assert bool(job.ended) == (phase == "")
        if phase:
            watch._phases.enter(phase)
            watch._look()
    assert job.ended[0][1].startswith("no progress")

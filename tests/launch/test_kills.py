"""A run that is killed thirty times, at any moment, ends as if nothing had happened."""

import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
from commands import TINY, before_each_call, forked
from test_resume import assert_same_run, steps_of_checkpoints

from moco_scale.training.run import Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

KILLS, STEPS = 30, 40
FLAGS = (*TINY, "--epochs", STEPS // 4, "--checkpoint-freq", 1, "--keep-checkpoints", 1)


def die_after(seconds: float, victims: tuple[int, ...]) -> None:
    """kill -9 this process so long after its training has begun, if it is one of the victims."""

    def doom(run: Run) -> None:
        if run.rank in victims:
            killer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
            killer.daemon = True
            killer.start()

    before_each_call("moco_scale.training.loop", "train", doom)


def test_killed_at_thirty_random_moments(tiny_shards: Path, tmp_path: Path) -> None:
    """One rank or both, while training or saving; what is left resumes from the newest whole one.

    Nobody kills the rank that is left over: it has to notice by itself, and to end.
    """
    flags = (*FLAGS, "--data-dir", tiny_shards)
    begin = time.monotonic()
    status, output = forked(*flags, "--output-dir", tmp_path / "reference", ranks=2)
    assert status == 0, output
    length = time.monotonic() - begin  # start included: kills also fall into a run's last part
    rng, kills, runs = random.Random(0), 0, 0
    while kills < KILLS:
        out, runs = tmp_path / f"run{runs}", runs + 1
        status, done = -1, 0
        while status != 0:
            delay, victims = rng.uniform(0, length / 6), rng.choice([(0,), (1,), (0, 1)])
            arguments = (delay, victims) if kills < KILLS else (0.0, ())  # let the last one end
            status, output = forked(
                *flags, "--output-dir", out, ranks=2, prepare=die_after, prepare_args=arguments
            )
            kills += status != 0
            if done:
                assert f"step-{done:08d} at step {done}" in output, output
            newest = (steps_of_checkpoints(out) or [0])[-1] if out.is_dir() else 0
            assert newest >= done, output
            done = newest
            assert "Traceback" not in output, output
        assert_same_run(out, tmp_path / "reference")

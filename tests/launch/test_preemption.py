"""SIGTERM from outside, at any moment: saved and gone, and the same command goes on as ever."""

import os
import signal
import time
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from commands import TINY, before_each_call, forked, forked_ranks
from test_resume import assert_same_run, steps_of_checkpoints

from moco_scale.utils.errors import STOPPED_EARLY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

GONE = 120.0
"""Seconds that are far more than an orderly end takes, and less than a collective's time-out."""

# The demo's kind of run: kNN after each epoch, readers of their own, saving beside the loop.
FLAGS = (*TINY, "--knn-freq", 1, "--num-workers", 1, "--checkpoint-freq", 3)

# (module, function, at which of its calls)
MOMENTS = {
    "training": ("moco_scale.engines.ddp", "DDPEngine.backward", 6),
    "evaluating": ("moco_scale.evaluation.knn", "KnnMonitor.measure", 2),
    "evaluating before training": ("moco_scale.evaluation.knn", "KnnMonitor.measure", 1),
    "saving": ("moco_scale.checkpoints.checkpoint", "_complete", 1),
    "waiting for data": ("moco_scale.data.loading.workers", "BatchLoader.__next__", 9),
    "drawing": ("moco_scale.evaluation.figures", "neighbours_sheet", 1),
}


def announce(folder: str, module: str, function: str, call: int) -> None:
    """Say when a function is called for the n-th time, and go on once the signal has been sent."""
    calls = count(1)

    def say(*args: Any, **kwargs: Any) -> None:
        if next(calls) == call:
            Path(folder, f"there-{os.environ['RANK']}").touch()
            deadline = time.monotonic() + GONE
            while not Path(folder, "sent").exists() and time.monotonic() < deadline:
                time.sleep(0.01)

    before_each_call(module, function, say)


@pytest.fixture(scope="module")
def reference(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run of two processes."""
    out = tmp_path_factory.mktemp("preemption") / "out"
    status, output = forked(*FLAGS, "--data-dir", tiny_shards, "--output-dir", out, ranks=2)
    assert status == 0, output
    return out


@pytest.mark.parametrize("moment", MOMENTS)
def test_saved_and_gone_at_any_moment(
    reference: Path, tiny_shards: Path, tmp_path: Path, moment: str
) -> None:
    out = tmp_path / "out"
    flags = (*FLAGS, "--data-dir", tiny_shards, "--output-dir", out)
    where = (str(tmp_path), *MOMENTS[moment])
    with forked_ranks(*flags, ranks=2, prepare=announce, prepare_args=where) as job:
        deadline = time.monotonic() + 600
        while not (tmp_path / "there-0").exists():
            assert time.monotonic() < deadline, job.output()
            assert job.processes[0].exitcode is None, job.output()
            time.sleep(0.01)
        for process in job.processes:
            os.kill(process.pid, signal.SIGTERM)
        (tmp_path / "sent").touch()
        statuses = [job.status(rank, GONE) for rank in (0, 1)]
    assert statuses == [STOPPED_EARLY] * 2, job.output()
    assert job.output().count("SIGTERM: stopped") == 1
    assert "Traceback" not in job.output()
    saved = steps_of_checkpoints(out)
    status, output = forked(*flags, ranks=2)
    assert status == 0, output
    if saved:
        assert f"step-{saved[-1]:08d} at step {saved[-1]}" in output
    else:
        assert moment == "evaluating before training"
    assert_same_run(out, reference, buffers=moment in ("evaluating", "drawing"))
    assert {p.name for p in out.rglob(".*")} <= {".metadata", ".lock"}

"""How runs end: the rows of docs/endings.md that no other file tests."""

import multiprocessing
import os
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
from commands import TINY, before_each_call, forked
from test_resume import steps_of_checkpoints

from moco_scale.utils.errors import INTERRUPTED, LOST_PEER, STOPPED_EARLY

pytestmark = pytest.mark.timeout(1800)

HARM = {
    "training": ("moco_scale.engines.ddp", "DDPEngine.backward", 6),
    "saving": ("moco_scale.checkpoints.checkpoint", "_complete", 1),
}


def harm_at(moment: str, numbers: tuple[int, ...], whom: str, ignored: int = 0) -> None:
    """Send signals to this process, or to its readers, at a moment of the run."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    calls = count(1)
    module, function, at = HARM[moment]

    def harm(*args: object, **kwargs: object) -> None:
        if next(calls) == at:
            readers = [child.pid for child in multiprocessing.active_children()]
            for process in readers if whom == "readers" else [os.getpid()]:
                for number in numbers:
                    os.kill(int(process or 0), number)

    before_each_call(module, function, harm)


@pytest.mark.parametrize(
    ("number", "moment", "status"),
    [
        (signal.SIGHUP, "training", STOPPED_EARLY),
        pytest.param(signal.SIGINT, "training", INTERRUPTED, marks=pytest.mark.slow),
        (signal.SIGINT, "saving", INTERRUPTED),
    ],
)
def test_a_closed_terminal_and_ctrl_c_save(
    tiny_shards: Path, tmp_path: Path, number: signal.Signals, moment: str, status: int
) -> None:
    flags = (*TINY, "--checkpoint-freq", 4, "--data-dir", tiny_shards, "--output-dir", tmp_path)
    run = forked(*flags, prepare=harm_at, prepare_args=(moment, (number,), "itself"))
    assert run.status == status, run.output
    assert f"{number.name}: this run stops after the step under way and saves" in run.output
    (said,) = [line for line in run.output.splitlines() if f"{number.name}: stopped" in line]
    newest = steps_of_checkpoints(tmp_path)[-1]
    assert f"after step {newest} of 8, saved in" in said
    assert f"step {newest}/8" in run.output and f"step {newest + 1}/8" not in run.output
    assert "Traceback" not in run.output and "terminate called" not in run.output


def test_under_nohup_a_closed_terminal_is_nothing(tiny_shards: Path, tmp_path: Path) -> None:
    flags = (*TINY, "--data-dir", tiny_shards, "--output-dir", tmp_path)
    harm = ("training", (signal.SIGHUP,), "itself", True)
    run = forked(*flags, prepare=harm_at, prepare_args=harm)
    assert run.status == 0, run.output
    assert "SIGHUP" not in run.output


def write_to(place: str) -> None:
    """Give this process an output that takes nothing."""
    if place == "closed pipe":
        reading, output = os.pipe()
        os.close(reading)
    else:
        output = os.open(place, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(output, number)


@pytest.mark.parametrize(
    "place", ["closed pipe", pytest.param("/dev/full", marks=pytest.mark.slow)]
)
def test_a_run_goes_on_without_a_terminal(tiny_shards: Path, tmp_path: Path, place: str) -> None:
    engine = ("--deepspeed", "ds_configs/zero1.json") if place == "closed pipe" else ()
    flags = (*TINY, *engine, "--max-steps", 5)
    out = ("--data-dir", tiny_shards, "--output-dir", tmp_path)
    run = forked(*flags, *out, prepare=write_to, prepare_args=(place,))
    assert run.status == 0
    log = (tmp_path / "log.txt").read_text()
    assert all(f"step {step}/8" in log for step in range(1, 6))
    assert steps_of_checkpoints(tmp_path)[-1] == 5


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_killed_reader_ends_a_run_once_it_is_saved(
    tiny_shards: Path, tmp_path: Path, ranks: int
) -> None:
    flags = (*TINY, "--num-workers", 1, "--data-dir", tiny_shards, "--output-dir", tmp_path)
    harm = ("training", (signal.SIGKILL,), "readers")
    run = forked(*flags, ranks=ranks, prepare=harm_at, prepare_args=harm)
    assert run.status == LOST_PEER, run.output
    assert "SIGKILL" in run.output and "Traceback" not in run.output
    newest = steps_of_checkpoints(tmp_path)[-1]
    assert f"a reader was killed: stopped after step {newest} of 8" in run.output
    assert newest >= 6


def test_a_stopped_reader_of_one_process_is_named(tiny_shards: Path, tmp_path: Path) -> None:
    flags = (*TINY, "--num-workers", 1, "--data-dir", tiny_shards, "--output-dir", tmp_path)
    harm = ("training", (signal.SIGSTOP,), "readers")
    run = forked(*flags, "--hang-timeout", 4, prepare=harm_at, prepare_args=harm)
    assert run.status == LOST_PEER, run.output
    assert "rank 0 on" in run.output and "stands in" not in run.output
    assert "no progress; its child process" in run.output and "is stopped" in run.output
    (report,) = tmp_path.glob("hangs/*/rank-00000.txt")
    assert "_take" in report.read_text()  # the stack of who waits


@pytest.mark.slow
def test_the_table(repository: Path) -> None:
    """All of it, with real launchers; the minutes that it takes are not tested."""
    words = [sys.executable, "scripts/endings.py", "--launchers", "python", "torchrun", "deepspeed"]
    run = subprocess.run(words, cwd=repository, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout

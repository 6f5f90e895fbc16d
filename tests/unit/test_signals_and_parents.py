"""Ctrl-C in a program of ours, and processes that end with those that have started them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from moco_scale.distributed.launchers import has_launcher, started_by_deepspeed

# A mutex that is locked twice: no signal brings this thread back to Python.
STUCK = """
import ctypes
mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
lock(mutex)
print('in', flush=True)
lock(mutex)
"""
PROGRAM = """
import sys, time, signal
from moco_scale.commands.exit_status import run_program
from moco_scale.utils import signals
signals.HEARD_SECONDS = signals.ONE_SIGNAL = 0.2
def action():
    try:
        exec(sys.argv[1])
    finally:
        print("cleaned", flush=True)
run_program("it", action)
"""
WAIT = "print('in', flush=True); time.sleep(60)"
SLOW_CLEANING = """
try:
    print('in', flush=True); time.sleep(60)
finally:
    print('cleaning', flush=True); time.sleep(60)
"""


def started(action: str, prepare: Callable[[], object] | None = None) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, action],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,
        start_new_session=True,
    )


@pytest.mark.parametrize("action", [WAIT, STUCK])
def test_ctrl_c_ends_a_program_wherever_it_is(action: str) -> None:
    with started(action) as process:
        assert process.stdout and process.stdout.readline() == "in\n"
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "it: interrupted\n")
    assert action is STUCK or out.endswith("cleaned\n")


def test_a_second_ctrl_c_waits_for_nothing() -> None:
    with started(SLOW_CLEANING) as process:
        assert process.stdout and process.stdout.readline() == "in\n"
        process.send_signal(signal.SIGINT)
        # A signal in the middle of a write may have it written again.
        assert next(line for line in process.stdout if line != "in\n") == "cleaning\n"
        while process.poll() is None:
            process.send_signal(signal.SIGINT)
            time.sleep(0.1)
        _, errors = process.communicate()
    assert (process.returncode, errors) == (130, "it: interrupted\n")


def test_where_ctrl_c_is_ignored_it_stays_so() -> None:
    ignore = "print('in', flush=True); time.sleep(0.5)"
    with started(ignore, lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) as process:
        assert process.stdout and process.stdout.readline() == "in\n"
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=60)
    assert (process.returncode, out, errors) == (0, "cleaned\n", "")


@pytest.mark.parametrize(
    ("action", "status", "said"),
    [
        ("sys.exit('why')", 1, "why\n"),
        ("sys.exit(3)", 3, ""),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        (
            "from moco_scale.utils.errors import ReaderLost; raise ReaderLost('x')",
            69,
            "it: error: x\n",
        ),
    ],
)
def test_every_end_has_a_status(action: str, status: int, said: str) -> None:
    with started(action) as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert errors.endswith(said)


LAUNCHER = """
import os, subprocess, sys, time
words = [sys.executable, "-c", sys.argv[1]]
child = subprocess.Popen(words)
print(child.pid, flush=True)
time.sleep(60)
"""
BOUND = """
import os, time
from moco_scale.utils.parents import die_with
die_with(os.getppid())
print("bound", flush=True)
time.sleep(60)
"""
TRAINING = """
import os, time
from moco_scale.distributed import launcher_watch, launchers
launcher_watch._LOOK_SECONDS = 0.05
with launcher_watch.told_instead(lambda why: (print(why, flush=True), os._exit(0))):
    launcher_watch.leave_with_launcher(os.environ)
    print("started", flush=True)
    time.sleep(1 if not launchers.has_launcher(os.environ) else 60)
    print("done", flush=True)
"""


@pytest.fixture
def killed_parent() -> Iterator[Callable[..., tuple[int, int, Iterator[str]]]]:
    """Start a program below another; its number, its parent's, and the lines that it prints."""
    running: list[subprocess.Popen[str]] = []
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "PMI", "OMPI"))}

    def start(program: str, **environ: str) -> tuple[int, int, Iterator[str]]:
        parent = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, program],
            stdout=subprocess.PIPE,
            text=True,
            env=kept | environ,
        )
        running.append(parent)
        assert parent.stdout is not None
        lines = [parent.stdout.readline(), parent.stdout.readline()]
        number = next(int(line) for line in lines if line.strip().isdigit())
        return number, parent.pid, iter(parent.stdout)

    yield start
    for process in running:
        process.kill()
        process.communicate()


def test_a_process_dies_with_its_parent_even_if_it_is_stopped(
    killed_parent: Callable[..., tuple[int, int, Iterator[str]]],
) -> None:
    child, parent, lines = killed_parent(BOUND)
    os.kill(child, signal.SIGSTOP)
    os.kill(parent, signal.SIGKILL)
    assert list(lines) == []  # the end of its output is its own end


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2"}, "is gone"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "done"),  # by hand
        ({}, "done"),
    ],
)
def test_who_has_a_launcher_is_told_of_its_end(
    killed_parent: Callable[..., tuple[int, int, Iterator[str]]],
    environ: dict[str, str],
    said: str,
) -> None:
    _, parent, lines = killed_parent(TRAINING, **environ)
    os.kill(parent, signal.SIGKILL)
    assert said in next(lines)


def test_what_launchers_set_and_nobody_by_hand() -> None:
    assert has_launcher({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0"})
    assert not has_launcher({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0"})  # a batch script
    assert not has_launcher({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    assert started_by_deepspeed({"CROSS_RANK": "0", "CROSS_SIZE": "1", "LOCAL_SIZE": "2"})
    assert not started_by_deepspeed({"TORCHELASTIC_RUN_ID": "x"})

"""Signals reach all ranks at the same place, and a second one is heard in any."""

import os
import signal
import time
from typing import Any

import pytest
import torch
from harness import CONTEXT, free_port, run_ranks

from moco_scale.distributed import collectives, stop_signal
from moco_scale.distributed.stop_signal import StopRequest


def stand_in_a_collective(rank: int, port: int, ready: Any) -> None:
    """Wait for a peer that never comes, as one of two ranks."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    stop_signal.ONE_SIGNAL = 0.0
    collectives.initialize("cpu")
    if rank == 1:
        ready.wait()  # for the other; nobody sets it a second time
        signal.pause()
    with StopRequest(0, 0.0):
        work = collectives.start_max(torch.ones(1))
        ready.set()
        work.wait()  # in C++, where no Python handler runs


@pytest.mark.parametrize("number", stop_signal.SIGNALS)
def test_a_second_signal_ends_a_process_that_waits_for_another(number: int) -> None:
    port, ready = free_port(), CONTEXT.Event()
    ranks = [
        CONTEXT.Process(target=stand_in_a_collective, args=(rank, port, ready)) for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    try:
        assert ready.wait(120)
        waiting, deadline = ranks[0], time.monotonic() + 60
        os.kill(waiting.pid, number)
        waiting.join(1.0)
        assert waiting.exitcode is None  # one signal asks for an orderly end
        while waiting.exitcode is None and time.monotonic() < deadline:
            os.kill(waiting.pid, number)
            waiting.join(0.1)
        assert waiting.exitcode == -number
    finally:
        for process in ranks:
            process.kill()
            process.join()


def agree_and_look(number: int) -> list[Any]:
    """What ranks are told in each of five rounds, the last of them having got a signal."""
    told: list[Any] = []
    last = collectives.rank() == collectives.world_size() - 1
    with StopRequest(0, 0.0) as stop:
        for turn in range(5):
            if turn == 1 and last:
                os.kill(os.getpid(), number)
            code = 7 if turn == 2 and last else turn == 0
            told.append((stop.agree(code, 0), stop.look()))
    return told


@pytest.mark.parametrize("world", [1, 3])
def test_all_ranks_hear_of_it_in_the_same_round(world: int) -> None:
    name = "SIGUSR1"
    reasons = [None, name, name, name, name] if world == 1 else [None, None, name, name, name]
    codes = [1, 0, 7, 0, 0] if world == 1 else [0, 1, 0, 7, 0]
    expected = [((r, [c, 0]), r) for r, c in zip(reasons, codes, strict=True)]
    assert run_ranks(agree_and_look, world, signal.SIGUSR1) == [expected] * world


def signals_after_the_block() -> tuple[Any, int]:
    """What is left of the handlers."""
    before = [signal.getsignal(number) for number in stop_signal.SIGNALS]
    with StopRequest(0, 0.0):
        inside = [signal.getsignal(number) for number in stop_signal.SIGNALS]
    after = [signal.getsignal(number) for number in stop_signal.SIGNALS]
    return (before == after, before != inside), signal.set_wakeup_fd(-1)


def test_handlers_are_put_back() -> None:
    assert run_ranks(signals_after_the_block, 1) == [((True, True), -1)]

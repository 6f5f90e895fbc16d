"""Run a function on several gloo processes and hand its results, or its failures, to a test.

``results = run_ranks(function, world, *args)``: ``function`` is a module-level function, called on
each rank with the same arguments, in a process group that ``distributed.collectives`` has joined.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

# Ranks are forked off a server that has imported everything once: that is most of a start. There
# is one server for all tests of a session.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["moco_scale.training.loop", "matplotlib.figure", "matplotlib.ticker"]
)


class RankError(AssertionError):
    """One or more ranks failed or did not end; the message holds their tracebacks."""


def free_port() -> int:
    """A TCP port that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(
    function: Callable[..., Any],
    world: int,
    *args: Any,
    timeout: float = 120.0,
    device: str = "cpu",
) -> list[Any]:
    """What ``function(*args)`` returned on rank 0, 1, ..., each rank in its own process.

    Args:
        function: importable by name; its arguments and result must pickle (tensors may be in it).
        world: number of processes, one thread each.
        timeout: seconds after which every process is killed.
        device: ``"cpu"``, or ``"cuda"`` where each process has a GPU.

    Raises:
        RankError: a rank raised, was killed, or the time was up.
    """
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        outcomes = [Path(folder) / f"rank{rank}" for rank in range(world)]
        processes = [
            CONTEXT.Process(
                target=_one_rank,
                args=(function, args, rank, world, port, str(outcomes[rank]), device),
            )
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        late = _join(processes, time.monotonic() + timeout)
        results, failures = [], []
        for rank, (process, outcome) in enumerate(zip(processes, outcomes, strict=True)):
            if outcome.is_file():
                succeeded, value = pickle.loads(outcome.read_bytes())
                if succeeded:
                    results.append(value)
                else:
                    failures.append(f"rank {rank} of {world} raised\n{value}")
            elif rank in late:
                failures.append(f"rank {rank} of {world} was stopped: see the others, or a hang")
            else:
                failures.append(f"rank {rank} of {world} ended with status {process.exitcode}")
    if failures:
        # Tracebacks first: the others mostly failed because of them.
        raise RankError("\n".join(sorted(failures, key=lambda text: "raised" not in text)))
    return results


def in_processes(count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``function(*args, gate)`` returned in so many forks of this process, in any order.

    They are no ranks of a group. gate: a barrier that all of them may wait at, as they all do
    before they begin. A function must return, whatever happens.
    """
    context = multiprocessing.get_context("fork")
    gate, results = context.Barrier(count), context.SimpleQueue()

    def run() -> None:
        gate.wait()
        results.put(function(*args, gate))

    processes = [context.Process(target=run) for _ in range(count)]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return found


def _join(processes: list[Any], deadline: float) -> set[int]:
    """Wait for all; kill what still runs at the deadline or a while after one failed."""
    running = dict(enumerate(processes))
    while running and time.monotonic() < deadline:
        wait([p.sentinel for p in running.values()], deadline - time.monotonic())
        for rank in [r for r, p in running.items() if not p.is_alive()]:
            if running.pop(rank).exitcode != 0:
                # Its peers wait for it in a collective, most likely for ever.
                deadline = min(deadline, time.monotonic() + 5.0)
    for process in running.values():
        process.kill()
    for process in processes:
        process.join()
    return set(running)


def _one_rank(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    world: int,
    port: int,
    out: str,
    device: str,
) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    import torch

    from moco_scale.distributed import collectives

    torch.set_num_threads(1)
    outcome: tuple[bool, Any]
    try:
        collectives.initialize(device)
        outcome = (True, function(*args))
        content = pickle.dumps(outcome)
        collectives.shutdown()
    except BaseException:
        outcome = (False, traceback.format_exc())
        content = pickle.dumps(outcome)
    partial = Path(out + ".partial")
    partial.write_bytes(content)
    partial.rename(out)
    # Not an ordinary exit: a broken process group may block it.
    os._exit(0 if outcome[0] else 1)

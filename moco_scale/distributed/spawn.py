"""Run a function on several processes of this machine: for benchmarks and comparisons."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

import torch

from moco_scale.distributed import collectives


def run_ranks(
    function: Callable[..., Any], world: int, *args: Any, device: str = "cpu"
) -> list[Any]:
    """Return the result of ``function(*args)`` on each rank, in rank order.

    The processes are forked off a server that has imported everything, so that they start fast.

    Args:
        function: importable by name; called after joining the process group.
        world: number of processes.
        args: of the function; they and the result must pickle.
        device: as :func:`moco_scale.distributed.collectives.initialize` takes it.

    Raises:
        SystemExit: A process failed; it has printed why.
    """
    if device == "cpu":
        # Otherwise DeepSpeed looks for an accelerator and warns that it found none.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["moco_scale.training.loop", "torch.utils.tensorboard", "deepspeed"]
    )
    out = context.SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        context.Process(target=_one_rank, args=(function, rank, world, port, device, args, out))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    failed = False
    while len(results) < world and not failed:
        ready = wait([out._reader, *(p.sentinel for p in processes)])  # type: ignore[attr-defined]
        if not out.empty():
            rank, value = out.get()
            results[rank] = value
        elif out._reader not in ready:  # type: ignore[attr-defined]
            failed = any(p.exitcode for p in processes)
    for process in processes:
        if failed:
            process.kill()  # they would wait for the one that failed
        process.join()
    if failed:
        raise SystemExit(f"one of {world} processes failed: see the traceback above")
    return [results[rank] for rank in range(world)]


def _one_rank(
    function: Callable[..., Any],
    rank: int,
    world: int,
    port: int,
    device: str,
    args: tuple[Any, ...],
    out: Any,
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    collectives.initialize(device)
    out.put((rank, function(*args)))
    collectives.barrier()
    os._exit(0)  # without the teardown of gloo's and DeepSpeed's threads

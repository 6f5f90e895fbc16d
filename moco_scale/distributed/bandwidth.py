"""Bandwidth and latency between the processes of a job."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch

from moco_scale.distributed import collectives
from moco_scale.distributed.collectives import Subgroup

SECONDS = 0.15
"""Rough cost of each figure."""


class Bandwidth(NamedTuple):
    """Bandwidth and latency of the slowest process of a group.

    Attributes:
        ranks: in the largest group.
        size: bytes of the tensor on each rank.
        all_reduce: bytes a second over the link of one process: 2 (n - 1) / n of the tensor's
            bytes, as the best algorithm sends and receives, over the time taken.
        all_to_all: likewise, (n - 1) / n of the tensor's bytes.
        latency: seconds of an all-reduce of one number.
    """

    ranks: int
    size: int
    all_reduce: float
    all_to_all: float
    latency: float


def measure(group: Subgroup) -> Bandwidth:
    """Measure in all groups at once, as training does; every rank calls it.

    Args:
        group: of this rank; the groups of all ranks tile the job.
    """
    device = collectives.device()
    size = (64 if device.type == "cuda" else 8) << 20
    ranks = max(collectives.gather_objects(group.size))
    floats = torch.zeros(size // 4, device=device)
    number = torch.zeros(1, device=device)
    # One row for each rank of this group; the remainder is not sent.
    rows = torch.zeros(group.size, size // group.size, dtype=torch.uint8, device=device)
    ones = [1] * group.size
    reduced = _seconds(lambda: collectives.sum_(floats, group.handle))
    exchanged = _seconds(lambda: collectives.start_exchange_rows(rows, ones, ones, group).wait())
    latency = _seconds(lambda: collectives.sum_(number, group.handle))
    sent = size * (ranks - 1) / ranks
    return Bandwidth(ranks, size, 2 * sent / reduced, sent / exchanged, latency)


def _seconds(action: Callable[[], object]) -> float:
    """Median time of the slowest rank, after a first time that opens the connections."""
    _timed(action)
    repeats = max(3, min(50, math.ceil(SECONDS / _timed(action))))
    return median(_timed(action) for _ in range(repeats))


def _timed(action: Callable[[], object]) -> float:
    collectives.barrier()
    start = time.perf_counter()
    action()
    if collectives.device().type == "cuda":
        torch.cuda.synchronize()
    slowest = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    if (work := collectives.start_max(slowest)) is not None:
        work.wait()
    return max(float(slowest), 1e-9)

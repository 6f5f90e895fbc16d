"""The harness itself: results come in rank order, failures and hangs surface."""

import os
import signal
import threading

import pytest
import torch
from harness import RankError, run_ranks

from moco_scale.distributed import collectives


def sum_of_ranks(offset: int) -> tuple[int, float]:
    total = collectives.sum_(torch.tensor(float(collectives.rank() + offset)))
    return collectives.rank(), total.item()


def fail_on_rank_one() -> None:
    if collectives.rank() == 1:
        raise ValueError("a defect on purpose")
    collectives.barrier()


def hang() -> None:
    threading.Event().wait()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_results_come_in_rank_order() -> None:
    assert run_ranks(sum_of_ranks, 3, 10) == [(0, 33.0), (1, 33.0), (2, 33.0)]


def test_a_failure_shows_its_traceback() -> None:
    with pytest.raises(RankError, match=r"rank 1 of 2 raised(.|\n)*a defect on purpose"):
        run_ranks(fail_on_rank_one, 2)


def test_a_hang_and_a_death_are_reported() -> None:
    with pytest.raises(RankError, match="rank 0 of 1 was stopped"):
        run_ranks(hang, 1, timeout=0.5)
    with pytest.raises(RankError, match="status -9"):
        run_ranks(die, 1)

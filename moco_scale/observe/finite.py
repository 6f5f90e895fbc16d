"""Detection of losses, weights and gradients that are not finite, without device syncs."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moco_scale.utils.log import log

LOSS, WEIGHTS, GRADIENTS = KINDS = ("its loss", "the weights after it", "its gradients")


class _Flags(NamedTuple):
    step: int
    values: Tensor
    skipped: bool
    ready: torch.cuda.Event | None


class FiniteWatch:
    """Checks each step's loss and weights while the next step runs.

    A gradient that is not finite shows in the weights that it was added to, or in a step that was
    skipped although no loss scale could be lowered. Steps that fp16's loss scale skips are fine.

    Args:
        limit: bad steps in a row that end the run.
        rank: this process's.
        last_good: names the checkpoint to go back to, for the message.
    """

    def __init__(self, limit: int, rank: int, last_good: Callable[[], str]) -> None:
        self._limit, self._rank, self._last_good = limit, rank, last_good
        self._pending: deque[_Flags] = deque()
        self._bad_before = False
        self._in_a_row = 0

    def record(self, step: int, loss: Tensor, weights_finite: Tensor, skipped: bool) -> None:
        """Queue a step's values for checking.

        Args:
            step: its number.
            loss: scalar, this rank's.
            weights_finite: bool scalar, this rank's.
            skipped: the step was skipped, and not because a loss scale was too large.
        """
        flags = torch.stack([~loss.detach().isfinite(), ~weights_finite])
        ready = None
        if flags.is_cuda:
            flags = flags.to("cpu", non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self._pending.append(_Flags(step, flags, skipped, ready))

    def code(self) -> int:
        """Return this rank's code for :meth:`judge` of the step before the last; 0: finite.

        The first bad step in a row is logged here, on the rank where it happened.
        """
        if len(self._pending) < 2:
            return 0
        step, values, skipped, ready = self._pending.popleft()
        if ready is not None:
            ready.synchronize()  # of the step before: the device is busy with a whole step more
        bad_loss, bad_weights = values.tolist()
        if not (bad_loss or bad_weights or skipped):
            self._bad_before = False
            return 0
        kind = 0 if bad_loss else 1 if bad_weights else 2
        if not self._bad_before:
            log.warning(
                f"rank {self._rank} on {socket.gethostname()}: step {step} is not finite: "
                f"{KINDS[kind]}; last good checkpoint: {self._last_good()}"
            )
        self._bad_before = True
        return (3 - kind << 30) + self._rank  # a loss before what follows from it

    def judge(self, code: int) -> str | None:
        """Count a step by the largest code of all ranks; return why the run must end, or None."""
        if not code:
            self._in_a_row = 0
            return None
        self._in_a_row += 1
        if self._in_a_row < self._limit:
            return None
        what, rank = KINDS[3 - (code >> 30)], code & ((1 << 30) - 1)
        times = f"{self._in_a_row} steps in a row" if self._limit > 1 else "a step"
        return f"not finite in {times} (on rank {rank}: {what})"

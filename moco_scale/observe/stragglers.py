"""Step times of every rank, and the stragglers among them."""

from __future__ import annotations

import numpy as np
import torch

from moco_scale.distributed import collectives
from moco_scale.observe.phases import (
    AGREE,
    BACKWARD,
    DATA,
    EMA,
    FORWARD,
    SHUFFLE,
    STEP_PHASES,
    SUMMING,
    Phases,
)

WORK = (DATA, FORWARD, BACKWARD, EMA)
"""Phases of a rank's own work; in the others it may be waiting for slower ranks."""
WAITS = (SHUFFLE, SUMMING, AGREE)
PERSISTS = 3  # reports in a row
TOO_LONG = 0.25  # of the median step, by which a rank's own work exceeds the median's
_NAMED = 3


class StepTimes:
    """Gathers every rank's times on rank 0, once for each report.

    A step takes all ranks equally long, because they wait for each other; a straggler waits less
    and works longer than the median rank.
    """

    def __init__(self) -> None:
        self._hosts = collectives.hosts()
        self._late = np.zeros(len(self._hosts), dtype=np.int64)

    def gather(self, phases: Phases, steps: int) -> tuple[dict[str, float], list[str]]:
        """Gather the times since the phases were last restarted; all ranks call it.

        Returns:
            On rank 0 the record for the log and the lines to print. The record has the seconds of
            a step, of waiting for data and of waiting in exchanges (least, median and most of all
            ranks), the rank with most work of its own, and its ratio to the median. The lines name
            ranks that begin or cease to be stragglers. Both are empty on other ranks.
        """
        spent = phases.worked()
        row = torch.tensor([[spent[phase] / max(steps, 1) for phase in STEP_PHASES]])
        rows = collectives.gather_rows_on_main(row)
        if rows is None:
            return {}, []
        table = dict(zip(STEP_PHASES, rows.numpy().T, strict=True))
        step = sum(table.values(), np.zeros(len(rows)))
        own = sum((table[phase] for phase in WORK), np.zeros(len(rows)))
        record: dict[str, float] = {}
        for name, values in (
            ("step", step),
            ("data_wait", table[DATA]),
            ("communication_wait", sum((table[phase] for phase in WAITS), np.zeros(len(rows)))),
        ):
            for which, function in (("min", np.min), ("median", _median), ("max", np.max)):
                record[f"{name}_seconds_{which}"] = float(function(values))
        slowest = int(own.argmax())
        record["slowest_rank"] = slowest
        record["slowest_ratio"] = float(own[slowest] / max(_median(own), 1e-9))
        return record, self._stragglers(table, own, step)

    def _stragglers(
        self, table: dict[str, np.ndarray], own: np.ndarray, step: np.ndarray
    ) -> list[str]:
        before = self._late >= PERSISTS
        late = own - _median(own) > TOO_LONG * _median(step)
        self._late = np.where(late, self._late + 1, 0)
        new = np.flatnonzero((self._late >= PERSISTS) & ~before)
        lines = []
        for rank in new[np.argsort(-own[new], kind="stable")][:_NAMED]:
            phase = max(WORK, key=lambda name: table[name][rank] - _median(table[name]))
            ratio = own[rank] / max(_median(own), 1e-9)
            lines.append(
                f"{self._name(rank)} keeps the others waiting: {own[rank]:.3f} s of work of its "
                f"own a step, {ratio:.1f} times the median; longer in {phase}, "
                f"{table[phase][rank]:.3f} s against {_median(table[phase]):.3f} s"
            )
        if len(new) > _NAMED:
            lines.append(f"so do {len(new) - _NAMED} more ranks")
        for rank in np.flatnonzero(before & ~late)[:_NAMED]:
            lines.append(f"{self._name(rank)} no longer keeps the others waiting")
        return lines

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._hosts[rank]}"


def _median(values: np.ndarray) -> float:
    """Lower median: of two ranks, the quick one."""
    return float(np.sort(values)[(len(values) - 1) // 2])

"""``metrics.jsonl``: a line of JSON for each step that was logged."""

from __future__ import annotations

from pathlib import Path

from moco_scale.observe.side_files import keep_lines
from moco_scale.untrusted.documents import record_of
from moco_scale.untrusted.metrics import records

NAME = "metrics.jsonl"


def has_step(path: Path, step: int) -> bool:
    """Find a step's line; False also where the file cannot be read."""
    try:
        return any(record["step"] == step for record in records(path))
    except OSError:
        return False


def forget_after(path: Path, step: int) -> int:
    """Drop damaged lines and those of later steps, which will run again; return their number.

    Raises:
        OSError: The file cannot be read or written.
    """

    def wanted(line: bytes) -> bool:
        of = _step_in(line)
        return of is not None and of <= step

    return keep_lines(path, wanted)


def _step_in(line: bytes) -> int | None:
    step = (record_of(line) or {}).get("step")
    return step if isinstance(step, int) else None

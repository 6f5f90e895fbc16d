"""``metrics.jsonl``: a JSON object for each logged step, possibly cut off or edited."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field

from moco_scale.untrusted.documents import Document, lines_of, record_of
from moco_scale.untrusted.limits import STEPS


class Record(Document):
    """Record with the values that every one must have to be drawn; others are not checked."""

    model_config = ConfigDict(extra="allow")

    step: int = Field(ge=0, le=STEPS)
    epoch: float = Field(default=0.0, ge=0)


def records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a file in order; other lines are skipped.

    Raises:
        OSError: It cannot be read.
    """
    for line in lines_of(path):
        with contextlib.suppress(ValueError):  # such as the last line of a killed run
            yield Record.model_validate(record_of(line)).model_dump()

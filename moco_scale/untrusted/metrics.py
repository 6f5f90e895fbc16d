"""``metrics.jsonl``: one JSON object a logged step, possibly cut off or edited."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, ValidationError
from pydantic_core import from_json

from moco_scale.untrusted.documents import Document
from moco_scale.untrusted.limits import LINE, STEPS


class Record(Document):
    """What every record must have to be drawn; other values are taken as they are."""

    model_config = ConfigDict(extra="allow")

    step: int = Field(ge=0, le=STEPS)
    epoch: float = Field(default=0.0, ge=0)


def records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a file in its order; lines that are none are skipped.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        while line := file.readline(LINE):
            try:
                # NaN is a loss that was logged.
                yield Record.model_validate(from_json(line)).model_dump()
            except (ValueError, ValidationError):
                continue  # such as the last line of a killed run

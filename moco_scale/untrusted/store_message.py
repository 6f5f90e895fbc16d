"""Messages of ranks through torch's store, which anybody who reaches its port can write.

The store has no password: a stranger can end a run, but not have anything written or executed.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from moco_scale.untrusted.documents import Document, parse_document

_Count = Annotated[int, Field(ge=0, le=1 << 53)]
_Name = Annotated[str, Field(max_length=255)]


class HeartbeatMessage(Document):
    """One heartbeat of a rank.

    Attributes:
        rank: of the process.
        host: its name.
        count: heartbeats so far; it no longer changes when the process does not run.
        clock: time of day on that host.
        step: of its position.
        entry: likewise.
        phase: likewise.
        idle_seconds: without progress at that position.
        slow_phase: the phase may take long: start, compile, evaluation, save.
        device: step, entry and phase that its GPU has reached, once the rank is idle.
    """

    rank: _Count
    host: _Name
    count: _Count
    clock: Annotated[str, Field(pattern=r"^\d\d:\d\d:\d\d$")]
    step: _Count
    entry: _Count
    phase: _Name
    idle_seconds: Annotated[float, Field(ge=0, le=1e9)]
    slow_phase: bool
    device: Annotated[tuple[_Count, _Count, _Name] | None, Field(strict=False)] = None


class Verdict(Document):
    """Reason why all ranks end.

    Attributes:
        text: for people.
        ended: one rank had an error of its own.
        at: seconds since 1970 when it was posted; names the folder of the ranks' reports.
    """

    text: Annotated[str, Field(max_length=20_000)]
    ended: bool
    at: Annotated[int, Field(ge=0, le=1 << 33)]


def parse_verdict(content: bytes) -> Verdict:
    """Read a verdict. Raises DocumentError."""
    return parse_document(content, Verdict, "the verdict in the store")

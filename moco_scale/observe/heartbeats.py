"""Heartbeats of ranks, and the messages made from them when a run hangs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from moco_scale.observe.phases import FINISH, START
from moco_scale.untrusted.documents import parse_document
from moco_scale.untrusted.store_message import HeartbeatMessage

_LISTED = 6  # groups of ranks that a message spells out


class Heartbeat(HeartbeatMessage):
    """One heartbeat of a rank."""

    def encode(self) -> str:
        """Return the heartbeat as JSON."""
        return self.model_dump_json()

    @staticmethod
    def decode(text: bytes) -> Heartbeat:
        """Read a heartbeat that anybody may have written. Raises DocumentError."""
        return parse_document(text, Heartbeat, "a heartbeat in the store")

    @property
    def name(self) -> str:
        """Rank and host."""
        return f"rank {self.rank} on {self.host}"

    @property
    def place(self) -> str:
        """Phase and step of the process, and of its GPU where that is behind."""
        where = place(self.step, self.phase)
        if self.device and self.device[:2] != (self.step, self.entry):
            where += f" (its GPU: {place(self.device[0], self.device[2])})"
        return where


class LastSeen(NamedTuple):
    """Newest heartbeat of a rank, and when it changed on this process's clock."""

    beat: Heartbeat
    changed: float


def place(step: int, phase: str) -> str:
    """Name a place in the run: ``phase forward of step 17``."""
    without = phase in (START, FINISH) or not step  # eval.py has no steps
    return f"phase {phase}" + ("" if without else f" of step {step}")


def silent(seen: Mapping[int, LastSeen], world: int, now: float, after: float) -> str | None:
    """Name the ranks without a heartbeat for `after` seconds; None when there are none."""
    never = [rank for rank in range(world) if rank not in seen]
    gone = [each.beat for each in seen.values() if now - each.changed >= after]
    findings = []
    if never:
        findings.append(f"{_ranks(never)} never sent a heartbeat")
    if gone:
        since = min(beat.clock for beat in gone)
        were = "was" if len(gone) == 1 else "were"
        findings.append(
            f"{_by_host(gone)} {were} last seen at {since} (frozen, dead or cut off) "
            f"in {_places(gone)}"
        )
    return "; ".join(findings) or None


def waited_for(beats: Iterable[Heartbeat]) -> tuple[list[Heartbeat], list[Heartbeat]]:
    """Split live ranks into those behind and those that wait for them.

    Positions are the GPUs' where all are known. Nobody waits when all are equally far.
    """
    beats = list(beats)
    far = [(beat.step, beat.entry) for beat in beats]
    devices = [beat.device[:2] for beat in beats if beat.device is not None]
    if len(devices) == len(beats):
        far = devices
    last = min(far)
    behind = [beat for beat, at in zip(beats, far, strict=True) if at == last]
    return behind, [beat for beat, at in zip(beats, far, strict=True) if at != last]


def standing(behind: list[Heartbeat], waiting: list[Heartbeat]) -> str:
    """Describe the result of :func:`waited_for` in a sentence."""
    if not waiting:
        return (
            f"all ranks are alive and stand in {_places(behind)}: the network between them, or "
            "the library that uses it, does not deliver"
        )
    idle = max(beat.idle_seconds for beat in behind)
    stand, alive, them = ("stands", "is", "it") if len(behind) == 1 else ("stand", "are", "them")
    return (
        f"{_by_host(behind)} {stand} in {_places(behind)} for {idle:.0f} s and {alive} alive; "
        f"the others wait for {them} in {_places(waiting)}"
    )


def _ranks(ranks: Iterable[int]) -> str:
    """Name ranks: ``rank 3``, ``ranks 0-3, 8``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    names = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    several = len(runs) > 1 or runs[0][0] != runs[0][1]
    return f"rank{'s' if several else ''} {_listed(names)}"


def _by_host(beats: Iterable[Heartbeat]) -> str:
    hosts: dict[str, list[int]] = defaultdict(list)
    for beat in beats:
        hosts[beat.host].append(beat.rank)
    return _listed([f"{_ranks(ranks)} on {host}" for host, ranks in hosts.items()])


def _places(beats: Iterable[Heartbeat]) -> str:
    places: dict[str, list[int]] = defaultdict(list)
    for beat in beats:
        places[beat.place].append(beat.rank)
    if len(places) == 1:
        return next(iter(places))
    return _listed([f"{where} ({_ranks(ranks)})" for where, ranks in places.items()])


def _listed(names: list[str]) -> str:
    more = [f"{len(names) - _LISTED} more"] if len(names) > _LISTED else []
    return ", ".join(names[:_LISTED] + more)

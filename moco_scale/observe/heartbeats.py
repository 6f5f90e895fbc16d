"""What ranks let each other know while they run, and what it says when they stand still."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from moco_scale.observe.phases import FINISH, START
from moco_scale.untrusted.documents import parse_document
from moco_scale.untrusted.store_message import BeatMessage

_LISTED = 6  # groups of ranks that a message spells out


class Beat(BeatMessage):
    """A sign of life, and how to name its place."""

    def encode(self) -> str:
        return self.model_dump_json()

    @staticmethod
    def decode(text: bytes) -> Beat:
        """Read what another rank, or anybody, has written. Raises DocumentError."""
        return parse_document(text, Beat, "a sign of life in the store")

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {self.host}"

    @property
    def place(self) -> str:
        where = place(self.step, self.phase)
        if self.device and self.device[:2] != (self.step, self.entry):
            where += f" (its GPU: {place(self.device[0], self.device[2])})"
        return where


class Heard(NamedTuple):
    """The newest beat of a rank, and when it was seen to change on this process's clock."""

    beat: Beat
    changed: float


def place(step: int, phase: str) -> str:
    """``phase forward of step 17``."""
    without = phase in (START, FINISH) or not step  # eval.py has no steps
    return f"phase {phase}" + ("" if without else f" of step {step}")


def silent(heard: Mapping[int, Heard], world: int, now: float, after: float) -> str | None:
    """Which ranks have not been heard of for so many seconds; None when all have."""
    never = [rank for rank in range(world) if rank not in heard]
    gone = [h.beat for h in heard.values() if now - h.changed >= after]
    parts = []
    if never:
        parts.append(f"{_ranks(never)} did not get as far as to be heard of")
    if gone:
        since = min(beat.clock for beat in gone)
        have, were = ("has", "was") if len(gone) == 1 else ("have", "were")
        parts.append(
            f"{_by_host(gone)} {have} not been heard of since {since} (frozen, dead or cut off); "
            f"last {were} in {_places(gone)}"
        )
    return "; ".join(parts) or None


def waited_for(beats: Iterable[Beat]) -> tuple[list[Beat], list[Beat]]:
    """Ranks that are alive but behind, and the others, who wait for them.

    Positions are those of the GPUs where these are known. Nobody waits when all are equally far.
    """
    beats = list(beats)
    far = [(beat.step, beat.entry) for beat in beats]
    devices = [beat.device[:2] for beat in beats if beat.device is not None]
    if len(devices) == len(beats):
        far = devices
    last = min(far)
    behind = [beat for beat, at in zip(beats, far, strict=True) if at == last]
    return behind, [beat for beat, at in zip(beats, far, strict=True) if at != last]


def standing(behind: list[Beat], waiting: list[Beat]) -> str:
    """What :func:`waited_for` found, as a sentence."""
    if not waiting:
        return (
            f"all ranks are alive and stand in {_places(behind)}: the network between them, or "
            "the library that uses it, does not deliver"
        )
    still = max(beat.still for beat in behind)
    stand, alive, them = ("stands", "is", "it") if len(behind) == 1 else ("stand", "are", "them")
    return (
        f"{_by_host(behind)} {stand} in {_places(behind)} for {still:.0f} s and {alive} alive; "
        f"the others wait for {them} in {_places(waiting)}"
    )


def _ranks(ranks: Iterable[int]) -> str:
    """``rank 3``, ``ranks 0-3, 8``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    names = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    several = len(runs) > 1 or runs[0][0] != runs[0][1]
    return f"rank{'s' if several else ''} {_listed(names)}"


def _by_host(beats: Iterable[Beat]) -> str:
    hosts: dict[str, list[int]] = defaultdict(list)
    for beat in beats:
        hosts[beat.host].append(beat.rank)
    return _listed([f"{_ranks(ranks)} on {host}" for host, ranks in hosts.items()])


def _places(beats: Iterable[Beat]) -> str:
    places: dict[str, list[int]] = defaultdict(list)
    for beat in beats:
        places[beat.place].append(beat.rank)
    if len(places) == 1:
        return next(iter(places))
    return _listed([f"{where} ({_ranks(ranks)})" for where, ranks in places.items()])


def _listed(parts: list[str]) -> str:
    more = [f"{len(parts) - _LISTED} more"] if len(parts) > _LISTED else []
    return ", ".join(parts[:_LISTED] + more)

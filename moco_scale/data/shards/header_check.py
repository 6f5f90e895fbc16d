"""Check of tars' headers against their index, once.

Reading goes by the index, so a damaged header, or another tar of the same size, would be noticed
late or never. The headers are therefore compared with the index at the first start, and again
whenever a tar's time of change differs: ``SPLIT-checked.json``, in one of the places of
`data.shards.index_place`, holds the times of change at which they were right (several per tar,
because copies on the disks of several hosts may share the place).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moco_scale.data.shards.index_file import rows_by_shard
from moco_scale.data.shards.index_place import FOLDER, alone, first_writable, places, read_tars
from moco_scale.data.shards.tar_scan import member_places
from moco_scale.untrusted.documents import read_document
from moco_scale.untrusted.limits import INDEX_JSON
from moco_scale.untrusted.shard_index import CheckedNote
from moco_scale.utils.errors import UserError, open_failure
from moco_scale.utils.files import write_atomically
from moco_scale.utils.log import log
from moco_scale.utils.text import some_of

_MOST_TIMES = 16
_MOST_NAMED = 6


class IndexedTars(NamedTuple):
    """Tars of a split, and their entries in its index."""

    folder: Path
    split: str
    checksum: str
    """Checksum of the index."""
    paths: Sequence[Path]
    changed: Sequence[int]
    """Time of change of each tar, in nanoseconds."""
    rows: np.ndarray
    """INDEX_DTYPE, in the order of the tars."""


class _Problem(NamedTuple):
    text: str
    damaged: bool
    """And not only unreadable for now."""


def check_headers(tars: IndexedTars) -> None:
    """Read the headers of tars that are not known to be right.

    One process of those that share the place reads, in parallel processes; others wait for it.

    Raises:
        UserError: A tar cannot be read, is damaged, or has no image where the index has one.
    """
    near, far = places(tars.folder)
    if not _unknown(tars, near, far):
        return
    place = first_writable(near, far)
    if place is None:
        log.warning(
            f"{tars.folder}: each process reads the headers of the shards at each start, because "
            f"that they are right can be noted neither in {near} nor in {far}. Name a folder that "
            "can be written in the environment variable MOCO_SCALE_CACHE"
        )
        _raise(tars, _read(tars, _unknown(tars, near, far)))
        return
    waiting = f"{tars.folder}: another process reads the headers of its shards; waiting"
    with alone(place / f"{tars.split}-checked.lock", waiting):
        unknown = _unknown(tars, near, far)
        if not unknown:
            return
        problems = _read(tars, unknown)
        try:
            _note(tars, place, problems)
        except OSError as error:
            log.warning(
                f"{tars.folder}: that its shards are right cannot be noted in {place} "
                f"({error.strerror or error}): they are read again at the next start"
            )
        _raise(tars, problems)


def note_checked(tars: IndexedTars) -> None:
    """Record that headers are right, after writing them: the first start need not read them."""
    place = tars.folder / FOLDER
    place.mkdir(exist_ok=True)
    _note(tars, place, {})


def tar_problem(path: Path, rows: np.ndarray, file: int | None = None) -> str | None:
    """Describe what is wrong with a tar whose images are these rows of the index, or None.

    Args:
        path: of the tar.
        rows: of the index.
        file: its descriptor, where it is open.

    Raises:
        OSError: It cannot be read.
    """
    try:
        offsets, sizes = member_places(path, file)
    except UserError as error:
        return str(error)
    place = np.searchsorted(offsets, rows["offset"])
    there = place < len(offsets)
    there[there] = (offsets[place[there]] == rows["offset"][there]) & (
        sizes[place[there]] == rows["size"][there]
    )
    if there.all():
        return None
    first = rows[int(np.flatnonzero(~there)[0])]
    return (
        f"Shard {path} is not the one that its index was made of: the index has an image of "
        f"{first['size']} bytes at byte {first['offset']}, the tar has none there. Copy it again "
        "from where the shards were made, or make them again."
    )


def _noted(tars: IndexedTars, place: Path) -> list[list[int]]:
    """Read the times of change at which each tar was right."""
    nothing: list[list[int]] = [[] for _ in tars.paths]
    try:
        noted = read_document(place / _note_name(tars.split), CheckedNote, INDEX_JSON, "The note")
    except UserError:
        return nothing
    fits = noted.index == tars.checksum and len(noted.right) == len(nothing)
    return noted.right if fits else nothing


def _note_name(split: str) -> str:
    return f"{split}-checked.json"


def _note(tars: IndexedTars, place: Path, problems: Mapping[int, _Problem]) -> None:
    """Add the times of change of all tars without problems."""
    right = _noted(tars, place)
    for number, (times, time) in enumerate(zip(right, tars.changed, strict=True)):
        if number not in problems and time not in times:
            right[number] = [*times, time][-_MOST_TIMES:]
    content = json.dumps({"index": tars.checksum, "right": right})
    write_atomically(place / _note_name(tars.split), content, shared=True)


def _unknown(tars: IndexedTars, *noted_in: Path) -> list[int]:
    """List the numbers of tars that are not known to be right as they are now."""
    notes = [_noted(tars, place) for place in noted_in]
    return [
        number
        for number, time in enumerate(tars.changed)
        if not any(time in noted[number] for noted in notes)
    ]


def _read(tars: IndexedTars, numbers: Sequence[int]) -> dict[int, _Problem]:
    """Find the problems of tars, by number."""
    rows = rows_by_shard(tars.rows, len(tars.paths))
    work = [(tars.paths[i], rows[i]) for i in numbers]
    found = read_tars(_problem, work, f"reading the headers of {tars.folder}")
    return {
        number: problem
        for number, problem in zip(numbers, found, strict=True)
        if problem is not None
    }


def _problem(tar: tuple[Path, np.ndarray]) -> _Problem | None:
    try:
        text = tar_problem(*tar)
    except OSError as error:
        return _Problem(f"Cannot read shard {tar[0]}: {open_failure(error)}.", False)
    return None if text is None else _Problem(text, True)


def _raise(tars: IndexedTars, problems: Mapping[int, _Problem]) -> None:
    """Raise UserError if there are problems."""
    if not problems:
        return
    first, *others = problems
    text = problems[first].text
    if others:
        names = [tars.paths[number].name for number in others]
        text += f" Not right either: {some_of(names, _MOST_NAMED)}."
    if any(problem.damaged for problem in problems.values()):
        text += (
            " `python -m moco_scale shard --repair "
            f"{shlex.quote(str(tars.folder))}` keeps what is still good."
        )
    raise UserError(text)

"""That the tars of an index are those it was made of: their headers are read, once.

Reading goes by the index, so a damaged header, or a tar in the place of another one of its size,
would be noticed late or never. The headers are therefore compared with the index at the first
start, and again whenever a tar's time of change is not what it was: ``SPLIT-checked.json``, in one
of the places of `moco_scale.data.index_place`, holds the times at which they were found right.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moco_scale.data.index_place import FOLDER, alone, can_write, places, read_tars
from moco_scale.data.tar_scan import member_places
from moco_scale.errors import UserError
from moco_scale.files import write_atomically
from moco_scale.messages import say


class IndexedTars(NamedTuple):
    """The tars of a split, and what its index says of them."""

    folder: Path
    split: str
    checksum: str
    """Of the index."""
    paths: Sequence[Path]
    changed: Sequence[int]
    """Of each tar, its time of change in nanoseconds."""
    rows: np.ndarray
    """INDEX_DTYPE, in the order of the tars."""


def rows_of_shard(rows: np.ndarray, number: int) -> np.ndarray:
    """Those of one shard, of the rows of an index, which are in the order of the shards."""
    first, last = np.searchsorted(rows["shard"], [number, number + 1])
    return rows[first:last]


def check_headers(tars: IndexedTars) -> None:
    """Read the headers of those tars that are not known to be right.

    One process of those that share the place reads, in parallel processes; others wait for it.

    Raises UserError: a tar is damaged, or has no picture where the index has one.
    """
    near, far = places(tars.folder)
    if any(not _unknown(tars, place) for place in (near, far)):
        return
    place = next((place for place in (near, far) if can_write(place)), None)
    if place is None:
        say(f"{tars.folder}: what is checked now cannot be noted, neither in {near} nor in {far}")
        _read(tars, range(len(tars.paths)))
        return
    waiting = f"{tars.folder}: another process reads the headers of its shards; waiting"
    with alone(place / f"{tars.split}-checked.lock", waiting):
        unknown = _unknown(tars, place)
        if unknown:
            _read(tars, unknown)
            _note(tars, place)


def note_checked(tars: IndexedTars) -> None:
    """Note that the headers are right, who has written them: the first start need not read them."""
    place = tars.folder / FOLDER
    place.mkdir(exist_ok=True)
    _note(tars, place)


def tar_problem(path: Path, rows: np.ndarray) -> str | None:
    """What is wrong with a tar whose pictures are these rows of the index; None: nothing."""
    try:
        there = member_places(path)
    except UserError as error:
        return str(error)
    for offset, size in zip(rows["offset"].tolist(), rows["size"].tolist(), strict=True):
        if (offset, size) not in there:
            return (
                f"Shard {path} is not the one that its index was made of: the index has a picture "
                f"of {size} bytes at byte {offset}, the tar has none there. Copy it again from "
                "where the shards were made, or make them again."
            )
    return None


def _note_name(split: str) -> str:
    return f"{split}-checked.json"


def _note(tars: IndexedTars, place: Path) -> None:
    content = {"index": tars.checksum, "changed": list(tars.changed)}
    write_atomically(place / _note_name(tars.split), json.dumps(content))


def _unknown(tars: IndexedTars, place: Path) -> list[int]:
    """Numbers of the tars that were not found right as they are, by what is noted in a place."""
    everything = list(range(len(tars.paths)))
    try:
        noted = json.loads((place / _note_name(tars.split)).read_bytes())
        if noted["index"] != tars.checksum or len(noted["changed"]) != len(everything):
            return everything
        return [i for i in everything if noted["changed"][i] != tars.changed[i]]
    except (OSError, ValueError, KeyError, TypeError):
        return everything


def _read(tars: IndexedTars, numbers: Sequence[int]) -> None:
    starts = np.searchsorted(tars.rows["shard"], np.arange(len(tars.paths) + 1))
    work = [(tars.paths[i], tars.rows[starts[i] : starts[i + 1]]) for i in numbers]
    for problem in read_tars(_problem, work, f"reading the headers of {tars.folder}"):
        if problem is not None:
            folder = shlex.quote(str(tars.folder))
            raise UserError(
                f"{problem} What is still good can be kept with: python -m moco_scale shard "
                f"--repair {folder}"
            )


def _problem(tar: tuple[Path, np.ndarray]) -> str | None:
    return tar_problem(*tar)

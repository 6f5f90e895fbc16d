"""Index of shards that were written elsewhere: made on first use and kept.

It lies in a folder KEY of one of the two places of `data.shards.index_place`, in the format of
`data.shards.indexed_shards`. KEY is a hash of the tars' names, sizes and times of change, so a
replaced tar is noticed and all are scanned again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moco_scale.data.shards import index_file, indexed_shards
from moco_scale.data.shards.index_place import alone, first_writable, places, read_tars
from moco_scale.data.shards.shard_list import ShardList
from moco_scale.data.shards.tar_scan import ShardScan, dots_problem, scan_tar
from moco_scale.untrusted.limits import CLASSES
from moco_scale.untrusted.shard_index import json_name
from moco_scale.utils.errors import UserError, open_failure
from moco_scale.utils.files import replacing, sync, write_atomically
from moco_scale.utils.log import log
from moco_scale.utils.text import printable

_RULES = b"4"  # by which images and labels are found: an index made by others is made again


class _Key(NamedTuple):
    names: str
    state: str  # sizes and times of change

    def folder(self, place: Path) -> Path:
        return place / f"{self.names}-{self.state}"


def open_scanned(spec: str, shards: ShardList, split: str) -> indexed_shards.IndexedShards:
    """The images of a split of tars that have no index; makes it if there is none yet.

    One process of those that share the place of the index scans, in parallel processes; the others
    wait for it, and later runs find what it has written.

    Raises UserError: no such split; a tar is missing, damaged or holds no image (see `scan_tar`);
    names with several dots that mean two things; no place for the index.
    """
    if split not in shards.splits:
        raise UserError(
            f"{spec} has no split {split!r}; by their names its tars are: "
            f"{', '.join(sorted(shards.splits))}."
        )
    key, sizes, changed = _key(shards)
    near, far = places(shards.folder)
    for place in (near, far):
        found = _open(spec, shards, split, key.folder(place), changed)
        if found is not None:
            return found
    writable = first_writable(near, far)
    if writable is None:
        raise UserError(
            f"The index of {spec} can be written neither to {near} nor to {far}. Name a folder "
            "that can be written in the environment variable MOCO_SCALE_CACHE."
        )
    place = writable
    with alone(place / f"{key.names}.lock", f"{spec}: another process makes the index; waiting"):
        found = _open(spec, shards, split, key.folder(place), changed)
        if found is not None:
            return found
        _build(spec, shards, sizes, key.folder(place))
        for old in place.glob(f"{key.names}-*"):  # of the tars as they were before
            if old != key.folder(place):
                shutil.rmtree(old, ignore_errors=True)
        found = _open(spec, shards, split, key.folder(place), changed)
    if found is None:
        raise UserError(f"The index of {spec} was written to {place}, and cannot be read there.")
    return found


def _open(
    spec: str, shards: ShardList, split: str, folder: Path, changed: Mapping[str, int]
) -> indexed_shards.IndexedShards | None:
    """Open an index; None: there is none, or it is damaged and will be made again."""
    try:
        scanned = indexed_shards.Scanned(folder, spec, shards.splits, changed)
        return indexed_shards.IndexedShards.open(shards.folder, split, scanned=scanned)
    except UserError:
        return None


def _key(shards: ShardList) -> tuple[_Key, dict[str, int], dict[str, int]]:
    """Return the key, and each tar's size and time of change (ns)."""
    names, state = hashlib.blake2b(digest_size=8), hashlib.blake2b(_RULES, digest_size=8)
    sizes, changed = dict[str, int](), dict[str, int]()
    for split, members in sorted(shards.splits.items()):
        for name in members:
            path = shards.folder / name
            try:
                status = path.stat()
            except OSError as error:
                raise UserError(f"Cannot read shard {path}: {open_failure(error)}.") from error
            sizes[name], changed[name] = status.st_size, status.st_mtime_ns
            names.update(os.fsencode(f"{split}\0{name}\0"))
            state.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
    return _Key(names.hexdigest(), state.hexdigest()), sizes, changed


def _build(spec: str, shards: ShardList, sizes: dict[str, int], folder: Path) -> None:
    started = time.monotonic()
    tars = [shards.folder / name for members in shards.splits.values() for name in members]
    scans = read_tars(scan_tar, tars, f"indexing {spec}")
    write_index(spec, shards.splits, scans, sizes, folder, started)


def write_index(
    spec: str,
    splits: Mapping[str, Sequence[str]],
    scans: Sequence[ShardScan],
    sizes: Mapping[str, int],
    folder: Path,
    started: float,
    remarks: Mapping[str, Mapping[str, str]] | None = None,
) -> None:
    """Write the index of scanned tars to a folder, and say so.

    splits: the tars' names. scans: of all of them in this order. sizes, remarks: by name, the
    latter what else index.json says of it. started: when the work began, by `time.monotonic`.

    Raises UserError: names with several dots of which it cannot be told what they mean; it cannot
    be written.
    """
    everything = [(split, name) for split, names in splits.items() for name in names]
    named = [(name, scan) for (_, name), scan in zip(everything, scans, strict=True)]
    problem = dots_problem(named)
    if problem:
        raise UserError(f"{spec} {problem}")
    classes, why_none = find_classes(named)
    place = {name: i for i, name in enumerate(classes)}
    header: dict[str, Any] = {
        "format": index_file.FORMAT,
        "version": index_file.VERSION,
        "classes": classes,
        "splits": {},
        "made": {
            "scanned": json_name(spec),
            "without_image": sum(s.without_image for s in scans),
            "unlabelled": printable(why_none),
        },
    }
    # Readers look for a folder with an index.json: that comes last.
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for split in splits:
            chosen = [
                (name, scan)
                for (of, name), scan in zip(everything, scans, strict=True)
                if of == split
            ]
            rows = np.concatenate(
                [index_rows(number, scan, place) for number, (_, scan) in enumerate(chosen)]
            )
            entry = [(json_name(name), sizes[name], len(scan.offset)) for name, scan in chosen]
            described = index_file.split_entry(split, rows, entry)
            if remarks is not None:
                for shard, (name, _) in zip(described["shards"], chosen, strict=True):
                    shard.update(remarks[name])
            header["splits"][split] = described
            save_rows(folder / index_file.index_name(split), rows)
        write_atomically(folder / index_file.INDEX_JSON, json.dumps(header, indent=1), shared=True)
        sync(folder)
    except OSError as error:
        raise UserError(
            f"Cannot write the index of {spec} to {folder}: {error.strerror or error}."
        ) from error
    images = sum(len(scan.offset) for scan in scans)
    line = f"{spec}: indexed {images} images in {len(scans)} shards"
    line += f" in {time.monotonic() - started:.1f} s, kept in {folder}"
    without = header["made"]["without_image"]
    if without:
        line += f"; {without} samples without an image are skipped"
    lines = [line]
    dotted = next((scan.dotted for scan in scans if scan.dotted), "")
    if dotted:
        lines.append(
            f"names of images have several dots ({dotted}): they are split at the last one, or "
            "samples would have no image"
        )
    part = next((scan.part for scan in scans if scan.part), "")
    if part:
        lines.append(f"what is like {part} belongs to another image and is not seen")
    if why_none:
        lines.append(
            f"the labels are not used: {why_none}. Pretraining needs none, kNN and linear "
            "evaluation do"
        )
    log.info("\n".join(lines))


def find_classes(scans: Sequence[tuple[str, ShardScan]]) -> tuple[list[str], str]:
    """Find names of all classes: those in the tars, sorted, or the numbers themselves.

    Args:
        scans: of all tars, with their names.

    Returns:
        The names, and why there are none although there are labels, else "".
    """
    for shard, scan in scans:
        if scan.odd:
            return [], f"{printable(shard)} holds {scan.odd}"
    names = sorted({name for _, scan in scans for name in scan.names})
    numbered = [(int(scan.label.max()), shard) for shard, scan in scans if not scan.names]
    highest, shard = max(numbered, default=(-1, ""))
    if names and highest >= 0:
        other = next(shard for shard, scan in scans if scan.names)
        return [], f"they are numbers in {printable(shard)} and names in {printable(other)}"
    count = max(len(names), highest + 1)
    if count > CLASSES:
        return [], f"they would make {count} classes"
    return names or [str(number) for number in range(highest + 1)], ""


def index_rows(number: int, scan: ShardScan, place: Mapping[str, int]) -> np.ndarray:
    """Make the records of a tar.

    Args:
        scan: of the tar.
        number: of the tar.
        place: of each class; {} where there are none.
    """
    rows = np.zeros(len(scan.offset), index_file.INDEX_DTYPE)
    rows["shard"], rows["offset"], rows["size"] = number, scan.offset, scan.size
    rows["label"] = scan.label if place else -1
    if scan.names and place:
        numbers = np.array([*(place[name] for name in scan.names), -1])
        rows["label"] = numbers[scan.label]  # -1, unlabelled, is the last one
    return rows


def save_rows(path: Path, rows: np.ndarray) -> None:
    """Write the rows of a split atomically."""
    with replacing(path, shared=True) as file:
        np.save(file, rows, allow_pickle=False)

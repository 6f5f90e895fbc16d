"""Examination of shards: every byte is read, every image decoded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moco_scale.data.images.bad_image import only_zeros
from moco_scale.data.images.decode import DecodeError, decode_rgb
from moco_scale.data.shards import index_file
from moco_scale.data.shards.protocols import Place
from moco_scale.data.shards.shard_list import list_shards
from moco_scale.data.shards.tar_scan import (
    BLOCK,
    ShardScan,
    key_in,
    open_shard,
    scan_tar,
    shard_shown,
)
from moco_scale.data.tools.output_folder import LEFT_OUT
from moco_scale.untrusted.documents import lines_of, record_of
from moco_scale.untrusted.limits import IMAGE_FILE
from moco_scale.utils.errors import UserError
from moco_scale.utils.process_pool import BrokenProcessPool, in_order
from moco_scale.utils.progress import Progress
from moco_scale.utils.text import printable

_CHUNK = 1 << 22


class Finding(NamedTuple):
    """One problem."""

    shard: str
    offset: int
    """Place of the image; -1: the shard as a whole."""
    key: str  # this and the problem are fit to be shown
    problem: str

    def __str__(self) -> str:
        if self.offset < 0:
            return f"{printable(self.shard)}: {self.problem}"
        return f"{Place(self.shard, self.offset, self.key)}: {self.problem}"


class Expected(NamedTuple):
    """Expected shard, as far as it is known."""

    path: Path
    name: str  # below the folder
    bytes: int | None = None
    checksum: str | None = None  # hex BLAKE2b-128 of the file
    rows: np.ndarray | None = None  # of INDEX_DTYPE
    dropped: frozenset[str] = frozenset()  # keys that an earlier repair dropped from the index

    def is_labelled(self) -> bool:
        """The index has labels for it."""
        return self.rows is not None and bool((self.rows["label"] >= 0).any())


class Examined(NamedTuple):
    """Result of one shard."""

    expected: Expected
    bytes: int  # -1: there is none
    checksum: str
    scan: ShardScan | None  # None: its structure is damaged
    bad: frozenset[int]  # offsets of images that cannot be decoded or lie outside
    images: int  # that can be decoded
    findings: list[Finding]
    unreadable: bool = False  # it is there, and the system does not let it be read


class Folder(NamedTuple):
    """Folder of shards with its index."""

    path: Path
    classes: list[str] | None  # None: not known
    splits: dict[str, list[Expected]]
    problems: list[str]  # of the index
    indexed: bool  # it has, or had, an index of ours
    made: dict[str, Any]  # how; {} when not known


def list_folder(path: Path) -> Folder:
    """List the shards of a folder, from its index where readable, else from their names.

    Raises:
        UserError: The folder is missing, or holds no shards.
    """
    if not path.is_dir():
        raise UserError(f"There is no folder {path}.")
    problems, classes, made = [], None, dict[str, Any]()
    splits: dict[str, list[Expected]] = {}
    file = path / index_file.INDEX_JSON
    found = list_shards(str(path))
    indexed = file.exists() or any(path.glob("*-index.npy"))
    if file.exists():
        try:
            header = index_file.read_header(path)
        except UserError as error:
            problems.append(str(error))
        else:
            classes, made = header.classes, header.made
            dropped = _dropped(path)
            for split, entry in header.splits.items():
                shards = entry.shards
                rows: list[np.ndarray | None] = [None] * len(shards)
                try:
                    every = index_file.read_rows(path, split, header)
                    rows = list(index_file.rows_by_shard(every, len(shards)))
                except UserError as error:
                    problems.append(str(error))
                splits[split] = [
                    Expected(
                        path / shard.name,
                        shard.name,
                        shard.bytes,
                        shard.checksum,
                        of_shard,
                        dropped.get(shard.name, frozenset()),
                    )
                    for shard, of_shard in zip(shards, rows, strict=True)
                ]
    elif indexed:
        problems.append(f"{file} is missing.")
    if not splits and found is not None:
        splits = {
            split: [Expected(path / name, name) for name in names]
            for split, names in found.splits.items()
        }
    if not splits:
        raise UserError(f"{path} holds no shards: no *.tar, and no {index_file.INDEX_JSON}.")
    return Folder(path, classes, splits, problems, indexed, made)


def _dropped(folder: Path) -> dict[str, frozenset[str]]:
    """List by shard the keys that a repair dropped from the index and kept in the tar."""
    found: dict[str, set[str]] = {}
    try:
        lines = list(lines_of(folder / LEFT_OUT))
    except OSError:
        return {}
    for line in lines:
        name = (record_of(line) or {}).get("name")
        if not isinstance(name, str):
            continue
        shard, _, key = name.partition(":")
        found.setdefault(shard, set()).add(key)
    return {shard: frozenset(keys) for shard, keys in found.items()}


def examine_all(folder: Folder, workers: int, label: str) -> Iterator[tuple[str, Examined]]:
    """Yield (split, result) of every shard, in order; several processes read."""
    everything = [(s, expected) for s, shards in folder.splits.items() for expected in shards]
    try:
        with Progress(label, len(everything), "shards") as progress:
            results = in_order(examine, [expected for _, expected in everything], workers)
            for (split, _), (_, examined) in zip(everything, results, strict=True):
                yield split, examined
                progress.add(1)
    except BrokenProcessPool as error:
        raise UserError(
            "A process that examined shards was killed, probably for want of memory; try fewer "
            f"than --workers {workers}."
        ) from error


def examine(expected: Expected) -> Examined:
    """Read one shard from its first byte to its last, and decode its images."""
    path, findings = expected.path, list[Finding]()

    def wrong(problem: str, offset: int = -1, key: str = "") -> None:
        findings.append(Finding(expected.name, offset, key, problem))

    try:
        with os.fdopen(open_shard(path), "rb") as file:
            size, digest = 0, hashlib.blake2b(digest_size=16)
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
            checksum = digest.hexdigest()
            scan = None
            try:
                scan = scan_tar(path)
            except UserError as error:
                wrong(str(error).removeprefix(f"{shard_shown(path)} "))
            if scan is not None and scan.odd and expected.is_labelled():
                wrong(f"holds {scan.odd}")
                scan = None  # the index knows the labels: the tar can be made again
            if expected.bytes is not None and size != expected.bytes:
                wrong(f"it has {size} bytes, the index says {expected.bytes}")
            elif expected.checksum not in (None, checksum):
                wrong("its bytes are not those that were written: its checksum is another")
            places = _places(expected, scan, wrong)
            bad: set[int] = set()
            for offset, length in places:
                problem = _problem(file, offset, length, size)
                if problem is not None:
                    bad.add(offset)
                    wrong(problem, offset, key_before(file, offset))
            if scan is not None and expected.rows is not None:
                known = set(expected.rows["offset"].tolist())
                for offset in scan.offset.tolist():
                    key = key_before(file, offset)
                    if offset not in known and key not in expected.dropped:
                        wrong("an image that the index does not have", offset, key)
    except FileNotFoundError:
        return Examined(expected, -1, "", None, frozenset(), 0, [_missing(expected)])
    except UserError as error:
        wrong(str(error).removeprefix(f"{shard_shown(path)} "))
        return Examined(expected, -1, "", None, frozenset(), 0, findings, unreadable=True)
    except OSError as error:
        wrong(f"cannot be read: {error.strerror or error}")
        return Examined(expected, -1, "", None, frozenset(), 0, findings, unreadable=True)
    good = len(places) - len(bad)
    return Examined(expected, size, checksum, scan, frozenset(bad), good, findings)


def _missing(expected: Expected) -> Finding:
    count = "" if expected.rows is None else f", with {len(expected.rows)} images"
    return Finding(expected.name, -1, "", f"is missing{count}")


def _places(expected: Expected, scan: ShardScan | None, wrong: Any) -> list[tuple[int, int]]:
    """List (offset, size) of the images to decode: the index's, or else the tar's."""
    if expected.rows is None:
        if scan is None:
            return []
        return list(zip(scan.offset.tolist(), scan.size.tolist(), strict=True))
    places = list(
        zip(expected.rows["offset"].tolist(), expected.rows["size"].tolist(), strict=True)
    )
    if scan is not None:
        there = set(zip(scan.offset.tolist(), scan.size.tolist(), strict=True))
        for offset, _ in places:
            if (offset, _) not in there:
                wrong("the index has an image here, and the tar has none", offset)
        places = [place for place in places if place in there]
    return places


def _problem(file: Any, offset: int, length: int, end: int) -> str | None:
    """Explain why an image cannot be decoded, None when it can."""
    if offset + length > end:
        return f"cut off: the file ends at byte {end}"
    if length > IMAGE_FILE:
        return f"has {length:,} bytes, more than any image"
    file.seek(offset)
    data = file.read(length)
    try:
        decode_rgb(data)
    except DecodeError as error:
        reason = "nothing but zeros" if only_zeros(data) else printable(error)
        return f"cannot be decoded: {reason}"
    return None


def key_before(file: Any, offset: int) -> str:
    """Return the key in the header before an image, "" without a header."""
    return key_in(header_before(file, offset))


def header_before(file: Any, offset: int) -> bytes:
    """Return the block before an image, which should be its header; b"" without one."""
    if offset < BLOCK:
        return b""
    file.seek(offset - BLOCK)
    block: bytes = file.read(BLOCK)
    return block

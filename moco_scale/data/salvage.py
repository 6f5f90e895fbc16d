"""What can be kept of a tar whose structure is damaged, in a new tar."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from moco_scale.data.decode import DecodeError, decode_rgb
from moco_scale.data.examine import key_before
from moco_scale.data.sources import START_BYTES, picture_kind
from moco_scale.data.tar_scan import by_last_dot, picture_suffix

_BLOCK = tarfile.BLOCKSIZE


class Salvaged(NamedTuple):
    """What was kept and what was not."""

    kept: int
    lost: list[tuple[str, str]]
    """(key or place, why)."""


class _Sample(NamedTuple):
    key: str
    members: dict[str, tuple[int, int]]  # suffix: (offset, size)


def salvage(old: Path, new: Path, rows: np.ndarray | None) -> Salvaged:
    """Write the samples of `old` whose pictures can be decoded to `new`.

    Where a header is damaged, the search goes on at the next one that is not; with `rows`, the
    index of the shard, pictures behind damaged headers are found as well, and labels come from it.
    Raises OSError.
    """
    lost: list[tuple[str, str]] = []
    labels: dict[int, int] = {}
    if rows is not None:
        labels = dict(zip(rows["offset"].tolist(), rows["label"].tolist(), strict=True))
    kept = 0
    with old.open("rb") as file, tarfile.open(new, "w", format=tarfile.USTAR_FORMAT) as tar:
        end = os.fstat(file.fileno()).st_size
        samples = [own for sample in _samples(file, end) for own in _own(sample)]
        found = {place for sample in samples for place in sample.members.values()}
        if rows is not None:
            for offset, size in zip(rows["offset"].tolist(), rows["size"].tolist(), strict=True):
                if (offset, size) not in found:
                    samples.append(_by_index(file, offset, size, end))
        labelled = any("cls" in sample.members for sample in samples)
        samples.sort(key=lambda sample: min(sample.members.values()))
        used: set[str] = set()
        for sample in samples:
            picture = picture_suffix(sample.members)
            if picture is None:
                if rows is None:  # otherwise the index knows better what there should be
                    lost.append((sample.key, "its picture is not to be found"))
                continue
            offset, size = sample.members[picture]
            if labelled and "cls" not in sample.members and offset not in labels:
                lost.append((sample.key, "its label is not to be found"))
                continue
            if offset + size > end:
                lost.append((sample.key, "cut off with the end of the tar"))
                continue
            try:
                decode_rgb(_bytes(file, offset, size))
            except DecodeError as error:
                lost.append((sample.key, str(error)))
                continue
            key = sample.key
            while key in used:
                key += "-again"
            used.add(key)
            _write(tar, file, key, sample, labels.get(offset))
            kept += 1
    if kept == 0:
        new.unlink()
    return Salvaged(kept, lost)


def _samples(file: BinaryIO, end: int) -> Iterator[_Sample]:
    sample: _Sample | None = None
    for name, offset, size in _members(file, end):
        folder, slash, base = name.rpartition("/")
        stem, dot, suffix = base.partition(".")
        if not dot or not stem:
            continue
        if sample is None or sample.key != folder + slash + stem:
            if sample is not None:
                yield sample
            sample = _Sample(folder + slash + stem, {})
        sample.members[suffix.lower()] = offset, size
    if sample is not None:
        yield sample


def _own(sample: _Sample) -> list[_Sample]:
    """The sample, or those of its pictures by the last dots of their names; see `scan_tar`."""
    if picture_suffix(sample.members) is not None:
        return [sample]
    parts = by_last_dot(sample.members)
    if not any(picture_suffix(members) for members in parts.values()):
        return [sample]
    return [_Sample(f"{sample.key}.{k}" if k else sample.key, m) for k, m in parts.items()]


def _members(file: BinaryIO, end: int) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of the files behind all headers that are whole, as far as they reach."""
    at = 0
    while at + _BLOCK <= end:
        header = _bytes(file, at, _BLOCK)
        at += _BLOCK
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.TarError:  # on to the next block that is a header
            continue
        if member.size < 0 or at + member.size > end:
            continue
        if member.isreg():
            yield member.name, at, member.size
        at += member.size + -member.size % _BLOCK


def _by_index(file: BinaryIO, offset: int, size: int, end: int) -> _Sample:
    """A picture that no whole header leads to."""
    kind = picture_kind(_bytes(file, offset, START_BYTES)) if offset < end else ""
    suffix = "jpg" if kind in ("jpeg", "") else kind
    key = key_before(file, offset) or f"at-byte-{offset:012d}"
    return _Sample(key, {suffix: (offset, size)})


def _write(
    tar: tarfile.TarFile, file: BinaryIO, key: str, sample: _Sample, label: int | None
) -> None:
    members = {s: _bytes(file, *place) for s, place in sample.members.items()}
    if label is not None:  # what was read besides may be damaged
        members["cls"] = str(label).encode()
    for suffix, data in members.items():
        info = tarfile.TarInfo(f"{key}.{suffix}")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


def _bytes(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)

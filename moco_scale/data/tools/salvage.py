"""Salvage of a tar with a damaged structure to a new tar."""

from __future__ import annotations

import io
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from moco_scale.data.images.decode import DecodeError, decode_rgb
from moco_scale.data.images.formats import START_BYTES, suffix_by_content
from moco_scale.data.shards.tar_labels import LABEL_SUFFIXES
from moco_scale.data.shards.tar_scan import (
    KEY_SHOWN,
    by_last_dot,
    image_suffix,
    raw_key_in,
    split_name,
)
from moco_scale.data.tools.examine import header_before
from moco_scale.untrusted.limits import IMAGE_FILE
from moco_scale.untrusted.tar_headers import BLOCK, parse_header
from moco_scale.utils.text import printable

_WINDOW = 1 << 20  # bytes that are searched for headers at once


class Salvaged(NamedTuple):
    """Kept and lost samples."""

    kept: int
    lost: list[tuple[str, str]]
    """(key or place, why)."""


class _Sample(NamedTuple):
    key: str
    members: dict[str, tuple[int, int]]  # suffix: (offset, size)


def salvage(old: Path, new: Path, rows: np.ndarray | None) -> Salvaged:
    """Write the samples of `old` whose images can be decoded to `new`.

    After a damaged header, the search continues at the next intact one; with `rows`, the index of
    the shard, images behind damaged headers are found as well, and labels come from it.

    Raises:
        OSError: A file cannot be read or written.
    """
    lost: list[tuple[str, str]] = []
    labels: dict[int, int] = {}
    if rows is not None:
        labels = dict(zip(rows["offset"].tolist(), rows["label"].tolist(), strict=True))
    kept = 0
    with old.open("rb") as file, tarfile.open(new, "w", format=tarfile.GNU_FORMAT) as tar:
        end = os.fstat(file.fileno()).st_size
        samples = _joined([own for sample in _samples(file, end) for own in _own(sample)])
        found = {place for sample in samples for place in sample.members.values()}
        if rows is not None:
            for offset, size in zip(rows["offset"].tolist(), rows["size"].tolist(), strict=True):
                if (offset, size) not in found:
                    samples.append(_by_index(file, offset, size, end))
        labelled = any("cls" in sample.members for sample in samples)
        samples.sort(key=lambda sample: min(sample.members.values()))
        used, again = set[str](), Counter[str]()
        for sample in samples:
            shown = printable(sample.key, KEY_SHOWN)
            image = image_suffix(sample.members)
            if image is None:
                if rows is None:  # otherwise the index knows better what there should be
                    lost.append((shown, "its image is not to be found"))
                continue
            offset, size = sample.members[image]
            has_label = offset in labels or not sample.members.keys().isdisjoint(LABEL_SUFFIXES)
            if labelled and not has_label:
                lost.append((shown, "its label is not to be found"))
                continue
            if offset + size > end:
                lost.append((shown, "cut off with the end of the tar"))
                continue
            if size > IMAGE_FILE:
                lost.append((shown, f"has {size:,} bytes, more than any image"))
                continue
            try:
                decode_rgb(_bytes(file, offset, size))
            except DecodeError as error:
                lost.append((shown, printable(error)))
                continue
            key = sample.key
            while key in used:
                again[sample.key] += 1
                key = f"{sample.key}-again-{again[sample.key]}"
            used.add(key)
            _write(tar, file, key, sample, labels.get(offset))
            kept += 1
    if kept == 0:
        new.unlink()
    return Salvaged(kept, lost)


def _samples(file: BinaryIO, end: int) -> Iterator[_Sample]:
    sample: _Sample | None = None
    for name, offset, size in _members(file, end):
        key, suffix = split_name(name)
        if not key:
            continue
        if sample is None or sample.key != key or suffix in sample.members:
            if sample is not None:
                yield sample
            sample = _Sample(key, {})
        sample.members[suffix] = offset, size
    if sample is not None:
        yield sample


def _own(sample: _Sample) -> list[_Sample]:
    """Return the sample, or those of its images by the last dots of their names; see `scan_tar`."""
    if image_suffix(sample.members) is not None:
        return [sample]
    parts = by_last_dot(sample.members)
    if not any(image_suffix(members) for members in parts.values()):
        return [sample]
    return [_Sample(f"{sample.key}.{k}" if k else sample.key, m) for k, m in parts.items()]


def _joined(samples: list[_Sample]) -> list[_Sample]:
    """Join labels and the like that lie apart from their images; see `scan_tar`."""
    imaged = {s.key: s for s in reversed(samples) if image_suffix(s.members) is not None}
    kept = []
    for sample in samples:
        of = imaged.get(sample.key)
        if of is None or image_suffix(sample.members) is not None:
            kept.append(sample)
            continue
        for suffix, place in sample.members.items():
            of.members.setdefault(suffix, place)
    return kept


def _members(file: BinaryIO, end: int) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset, size) of the files behind all intact headers, as far as they reach."""
    at, start, window = 0, 0, b""
    while at + BLOCK <= end:
        if at + BLOCK > start + len(window):
            start, window = at, _bytes(file, at, _WINDOW)
        block = window[at - start : at - start + BLOCK]
        at += BLOCK
        if block[:1] == b"\0":
            continue  # no name: nothing that could be kept
        try:
            header = parse_header(block)
        except ValueError:  # on to the next block that is a header
            continue
        if at + header.size > end:
            continue
        if header.kind in b"0\x007" and not header.name.endswith("/"):
            yield header.name, at, header.size
        at += header.size + -header.size % BLOCK


def _by_index(file: BinaryIO, offset: int, size: int, end: int) -> _Sample:
    """Return an image that no intact header leads to."""
    suffix = suffix_by_content(_bytes(file, offset, START_BYTES) if offset < end else b"")[1:]
    key = raw_key_in(header_before(file, offset)) or f"at-byte-{offset:012d}"
    return _Sample(key, {suffix: (offset, size)})


def _write(
    tar: tarfile.TarFile, file: BinaryIO, key: str, sample: _Sample, label: int | None
) -> None:
    for suffix, (offset, size) in sample.members.items():
        if suffix == "cls" and label is not None:  # what was read besides may be damaged
            continue
        info = tarfile.TarInfo(f"{key}.{suffix}")
        info.size = size
        file.seek(offset)
        tar.addfile(info, file)
    if label is not None:
        data = str(label).encode()
        info = tarfile.TarInfo(f"{key}.cls")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


def _bytes(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)

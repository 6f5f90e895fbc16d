"""Header of a JPEG: sizes, metadata, and oddities that change no pixel."""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

from moco_scale.data.images.bad_image import DecodeError
from moco_scale.data.images.orientation import orientation_of
from moco_scale.untrusted.limits import IMAGE_PARTS, IMAGE_SCANS

_SEGMENT = struct.Struct(">BBH")
_MARKER = re.compile(rb"\xff+[^\0\xff]")
_NEXT_MARKER = re.compile(rb"\xff[^\0\xff\xd0-\xd7]")  # after the first scan
_FRAMES = frozenset(
    (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))
)
_PROGRESSIVE = frozenset((0xC2, 0xC6, 0xCA, 0xCE))
_ALONE = frozenset((0x01, *range(0xD0, 0xD8)))  # markers without a length
HOLE = bytes(512)
"""Bytes no JPEG has so many of in a row, unless a part of it was never written."""
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"


class Header(NamedTuple):
    """Properties of a JPEG, known before it is decoded."""

    width: int
    height: int
    components: int
    orientation: int
    """A key of UPRIGHT."""
    working: float
    """Bytes a pixel that a decoder holds besides: coefficients, where there are several scans."""
    least_bytes: float
    """Least length of a file with so many pixels."""


def segments(jpeg: bytes | memoryview) -> Iterator[tuple[int, int, int]]:
    """Walk over the segments up to the first scan, which is the last one.

    Gives (marker, place of its length, its end). Bytes between segments are skipped, as by libjpeg.

    Raises:
        DecodeError: There are more than any JPEG has.
    """
    at, last = 2, len(jpeg) - 4
    for _ in range(IMAGE_PARTS):
        first, marker, length = _SEGMENT.unpack_from(jpeg, at) if at <= last else (0, 0, 0)
        # A search takes longer than a look, and nearly always there is nothing between.
        if first != 0xFF or not 0 < marker < 0xFF:
            found = _MARKER.search(jpeg, at)
            if found is None:
                return
            at, marker = found.end() - 2, jpeg[found.end() - 1]
            length = int.from_bytes(jpeg[at + 2 : at + 4], "big")
        if marker in _ALONE:
            at += 2
            continue
        start, at = at + 2, at + 2 + length
        yield marker, start, at
        if 0xD8 <= marker <= 0xDA or length < 2:
            return
    raise DecodeError(f"broken JPEG: it has more than {IMAGE_PARTS:,} segments")


def exif_place(jpeg: bytes | memoryview) -> slice | None:
    """Return the place of EXIF's TIFF structure."""
    for marker, start, stop in segments(jpeg):
        if marker == 0xE1 and bytes(jpeg[start + 2 : start + 8]) == _EXIF:
            return slice(start + 8, max(start + 8, min(stop, len(jpeg))))
    return None


def orientation(jpeg: bytes | memoryview) -> int:
    """Return the orientation from EXIF or XMP, a key of UPRIGHT; 1 when there is none."""
    return _orientation(jpeg, [(at, stop) for marker, at, stop in segments(jpeg) if marker == 0xE1])


def _orientation(jpeg: bytes | memoryview, places: list[tuple[int, int]]) -> int:
    """Return the orientation from the metadata segments between these places."""
    exif, xmp = b"", b""
    for start, stop in places:
        segment = bytes(jpeg[start + 2 : stop])
        if segment.startswith(_EXIF):
            exif = exif or segment[len(_EXIF) :]
        elif segment.startswith(_XMP):
            xmp = xmp or segment[len(_XMP) :]
    return orientation_of(exif, xmp)


def read_header(jpeg: bytes | memoryview) -> Header:
    """Read the properties that decide about memory and time.

    Raises:
        DecodeError: There is no frame, or there are too many scans.
    """
    # This is done for every image, and after a decoder has had all caches: less is faster.
    kind = marker = start = stop = 0
    frame, metadata = b"", []
    for marker, start, stop in segments(jpeg):
        if marker == 0xE1:
            metadata.append((start, stop))
        elif marker in _FRAMES and not frame:
            kind, frame = marker, bytes(jpeg[start:stop])
    components = frame[7] if len(frame) > 7 else 0
    if not components or len(frame) < 8 + 3 * components:
        raise DecodeError("broken JPEG: its header is no whole one")
    height, width = frame[3] << 8 | frame[4], frame[5] << 8 | frame[6]
    if width == 0 or height == 0:
        raise DecodeError("broken JPEG: its header says that it has no pixels")
    samples, working = _samples(frame[9 : 8 + 3 * components : 3]), 0.0
    in_scan = jpeg[start + 2] if marker == 0xDA and start + 2 < len(jpeg) else 0
    if in_scan < components or kind in _PROGRESSIVE:
        _require_few_scans(jpeg, stop)
        working = 2 * samples
    # Of Huffman's codes each block of 64 samples takes one bit or more.
    least = width * height * samples / 64 / 8 if kind <= 0xC2 else 0.0
    turned = _orientation(jpeg, metadata) if metadata else 1
    return Header(width, height, components, turned, working, least)


@functools.lru_cache(16)
def _samples(factors: bytes) -> float:
    """Return the samples of a pixel.

    Args:
        factors: of each component, four bits across, four down.
    """
    areas = [(byte >> 4) * (byte & 15) for byte in factors]
    across, down = max(byte >> 4 for byte in factors), max(byte & 15 for byte in factors)
    return sum(areas) / max(1, across * down)


def _require_few_scans(jpeg: bytes | memoryview, at: int) -> None:
    """Raise DecodeError for a JPEG with too many scans after the first, at `at`."""
    scans = 1
    for _ in range(IMAGE_PARTS):
        found = _NEXT_MARKER.search(jpeg, at)
        if found is None or found[0] == b"\xff\xd9":
            return
        scans += found[0] == b"\xff\xda"
        if scans > IMAGE_SCANS:
            raise DecodeError(f"broken JPEG: it has more than {IMAGE_SCANS} scans")
        at = found.end() + int.from_bytes(jpeg[found.end() : found.end() + 2], "big")
    raise DecodeError(f"broken JPEG: it has more than {IMAGE_PARTS:,} segments")


def tidied(jpeg: bytes | memoryview) -> bytes:
    """Return the same JPEG without bytes that concern no pixel, for a strict decoder.

    Stray bytes between the segments before the scans go, and so do metadata; an unknown JFIF
    version becomes 1, and a sequential scan is declared to hold all coefficients, which it does by
    definition.
    """
    data = bytes(jpeg)
    parts, sequential = [data[:2]], False
    for marker, start, stop in segments(data):
        segment = data[start:stop]
        if 0xD8 <= marker <= 0xDA or len(segment) < 2:
            rest = data[start - 2 :]
            return b"".join(parts) + (_all_coefficients(rest) if sequential else rest)
        sequential |= marker in (0xC0, 0xC1)
        if marker == 0xE0 and segment[2:7] == b"JFIF\0":
            segment = segment[:7] + b"\1" + segment[8:]
        if marker in (0xE0, 0xEE) or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            parts += [b"\xff", bytes([marker]), segment]
    return data


def _all_coefficients(scans: bytes) -> bytes:
    """Correct the headers of scans, from the first one's marker on, to sequential ones."""
    changed, at = bytearray(scans), 0
    while (at := scans.find(b"\xff\xda", at)) >= 0:  # within a scan 255 is followed by 0
        components = scans[at + 4] if at + 4 < len(scans) else 0
        end = at + 5 + 2 * components
        if end + 3 <= len(scans):
            changed[end : end + 3] = b"\0\x3f\0"
        at += 2
    return bytes(changed)

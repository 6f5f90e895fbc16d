"""Orientation of an image, from EXIF or XMP in any state."""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

from moco_scale.untrusted.limits import IMAGE_METADATA

ORIENTATION = 0x0112  # EXIF's tag
# What makes an image of each orientation upright: (swap the axes, then flip rows, flip columns).
UPRIGHT = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
_MOST_ENTRIES = (1 << 16) - 1
_WHOLE_NUMBERS = {3: "H", 4: "I", 8: "h", 9: "i", 16: "Q"}  # TIFF's type: struct's
_XMP = re.compile(rb"tiff:Orientation\s*(?:=\s*[\"']|>)\s*([0-9])\s*[\"'<]")


class Entry(NamedTuple):
    """Entry of a TIFF directory."""

    tag: int
    kind: int
    length: int
    """Number of its values."""
    value: bytes
    """The field that holds the values, or, where they are longer, their place."""


class Directory(NamedTuple):
    """First directory of TIFF, which EXIF is too."""

    order: str
    """struct's sign of the order of bytes."""
    big: bool
    """True for BigTIFF, whose numbers are longer."""
    entries: list[Entry]

    @property
    def layout(self) -> str:
        """Format of an entry for struct."""
        return self.order + ("HHQ8s" if self.big else "HHI4s")

    def number(self, tag: int, default: int) -> int:
        """Return the single whole number of a tag."""
        for entry in self.entries:
            if entry.tag == tag and entry.kind in _WHOLE_NUMBERS and entry.length == 1:
                kind = self.order + _WHOLE_NUMBERS[entry.kind]
                if struct.calcsize(kind) <= len(entry.value):
                    return int(struct.unpack_from(kind, entry.value)[0])
        return default


def first_directory(tiff: bytes | memoryview) -> Directory | None:
    """Read the first directory as far as it goes; None where there is none."""
    order = {b"II": "<", b"MM": ">"}.get(bytes(tiff[:2]))
    try:
        if order is None:
            return None
        big = struct.unpack_from(order + "H", tiff, 2)[0] == 43
        (start,) = struct.unpack_from(order + ("Q" if big else "I"), tiff, 8 if big else 4)
        (count,) = struct.unpack_from(order + ("Q" if big else "H"), tiff, start)
    except (struct.error, OverflowError):
        return None
    found = Directory(order, big, [])
    start, width = start + (8 if big else 2), struct.calcsize(found.layout)
    stop = min(len(tiff), start + width * min(count, _MOST_ENTRIES))
    whole = tiff[start : start + max(0, stop - start) // width * width]
    found.entries.extend(map(Entry._make, struct.iter_unpack(found.layout, whole)))
    return found


def orientation_of(
    exif: bytes | memoryview | Directory | None, xmp: bytes | memoryview = b""
) -> int:
    """Return the orientation, a key of UPRIGHT; 1 where there is none, or nonsense.

    EXIF precedes XMP, as with Pillow. A number that is no whole one is nonsense.

    Args:
        exif: TIFF, with or without "Exif" before it, or its directory; b"" or None: none.
        xmp: XML; b"": none.
    """
    if isinstance(exif, (bytes, memoryview)):
        tiff = bytes(exif[:IMAGE_METADATA])
        for _ in range(2):  # some programs write it twice
            tiff = tiff.removeprefix(b"Exif\0\0")
        exif = first_directory(tiff)
    if exif is not None and any(entry.tag == ORIENTATION for entry in exif.entries):
        value = exif.number(ORIENTATION, 1)
    else:
        text = bytes(xmp[:IMAGE_METADATA])
        if text[:4].count(b"\0"):  # UTF-16, which is ASCII with zeros between
            text = text.replace(b"\0", b"")
        found = _XMP.search(text)
        value = int(found[1]) if found else 1
    return value if value in UPRIGHT else 1

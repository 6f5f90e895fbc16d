"""Image files in a zip, without unpacking it.

The list of files at the end of a zip is read in pieces, and of each file its place, so a zip of a
million files takes no more memory than a folder of them. Bytes are read by offset later, by many
processes at once, as those in a tar. Format: APPNOTE.TXT of PKWARE, with zip64.
"""

from __future__ import annotations

import itertools
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from moco_scale.data.images.formats import START_BYTES, image_kind, is_image, suffix_of
from moco_scale.data.tools.sources import Entry, Packed, PassedOver
from moco_scale.untrusted.limits import ZIP_DIRECTORY
from moco_scale.utils.errors import UserError
from moco_scale.utils.text import printable

_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LISTED = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_LONGEST_COMMENT = 1 << 16
_STORED, _DEFLATED = 0, 8
_ENCRYPTED, _UTF8 = 1, 1 << 11
_MOST_INFLATION = 1100  # deflate reaches 1032, for blank images
_LARGE, _MOST_INFLATION_OF_LARGE = 64 << 20, 100
_AGAIN = "Fetch it again."


class _Listed(NamedTuple):
    """File in the list of a zip."""

    name: str
    flags: int
    method: int
    crc: int
    packed: int  # bytes in the zip
    size: int  # bytes when unpacked
    offset: int  # of its header
    is_link: bool


def is_zip(source: Path, start: bytes) -> bool:
    """Recognise a zip by its first bytes, four at least."""
    kinds = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08", b"PK00")
    return start.startswith(kinds) or source.suffix.lower() == ".zip"


def scan_zip(source: Path, passed: PassedOver) -> Iterator[Entry]:
    """List image files in a zip; unreadable ones, such as encrypted, have their reason.

    Args:
        source: path of the zip.
        passed: counts other files.

    Raises:
        UserError: It is no zip, is damaged, truncated or one of several volumes, or its files share
            bytes.
        OSError: It cannot be read.
    """
    taken: list[tuple[int, int]] = []
    with source.open("rb") as file:
        first, last, shift = _directory(file, source)
        for listed in _files(file, first, last, shift, source):
            path = passed.path_of(listed.name)
            if not path or listed.name.endswith("/"):
                continue
            if not is_image(path) and suffix_of(path):
                passed.other(path)
                continue
            why = _refusal(listed)
            entry = Entry(path, str(source), 0, 0, None, why)
            if not why:
                entry = _entry(file, listed, path, source)
                taken.append((listed.offset, entry.offset + listed.packed))
            if is_image(path) or (not why and _starts_as_image(file, entry)):
                yield entry
            else:
                passed.other(path)
    taken.sort()
    for (_, end), (begin, _) in itertools.pairwise(taken):
        if begin < end:
            raise UserError(
                f"{source} holds files that share bytes: it is damaged, or made to fill disks."
            )


def unpack(data: bytes, size: int, packed: Packed) -> bytes:
    """Unpack an image from its bytes in the zip.

    Raises:
        ValueError: They are damaged, or of another size or checksum.
    """
    if packed.deflated:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            # One byte more shows that there is more; no more is made of it.
            data = inflater.decompress(data, size + 1)
        except zlib.error as error:
            raise ValueError(f"damaged in the zip ({error})") from None
    if len(data) != size:
        raise ValueError("damaged in the zip: not of the size that is listed")
    if zlib.crc32(data) != packed.crc:
        raise ValueError("damaged in the zip: its checksum is wrong")
    return data


def _directory(file: BinaryIO, source: Path) -> tuple[int, int, int]:
    """Find the start and end of the list of files, and the shift of its offsets."""
    length = os.fstat(file.fileno()).st_size
    tail_at = max(0, length - _END.size - _LONGEST_COMMENT)
    file.seek(tail_at)
    tail = file.read(_END.size + _LONGEST_COMMENT)
    found = tail.rfind(b"PK\x05\x06")
    if found < 0 or len(tail) < found + _END.size:
        raise UserError(
            f"{source} is no zip, or truncated: the list of its files is missing. {_AGAIN}"
        )
    _, disk, _, _, _, size, start, _ = _END.unpack_from(tail, found)
    last = tail_at + found
    file.seek(max(0, last - _LOCATOR.size))
    locator = file.read(_LOCATOR.size)
    if locator.startswith(b"PK\x06\x07") and last >= _LOCATOR.size + _END64.size:
        file.seek(last - _LOCATOR.size - _END64.size)
        end64 = file.read(_END64.size)
        if not end64.startswith(b"PK\x06\x06"):
            raise _damaged(source, "the end of a zip64 is not where it should be")
        *_, size, start = _END64.unpack(end64)
        disk = max(_END64.unpack(end64)[4:6])
        last -= _LOCATOR.size + _END64.size
    if disk:
        raise UserError(f"{source} is the last of several parts: join them with zip -s 0 first.")
    if size > min(last, ZIP_DIRECTORY) or start > last - size:
        raise _damaged(source, "the list of its files does not lie in it")
    return last - size, last, last - size - start


def _files(file: BinaryIO, first: int, last: int, shift: int, source: Path) -> Iterator[_Listed]:
    """Yield the files in the list at [first, last)."""
    at = first
    while at < last:
        file.seek(at)
        fixed = file.read(_LISTED.size)
        if len(fixed) < _LISTED.size or not fixed.startswith(b"PK\x01\x02"):
            raise _damaged(source, f"its list of files has something else at byte {at}")
        (_, made_by, _, flags, method, _, _, crc, packed, size, names, extras, comments, *_, mode,
         offset) = _LISTED.unpack(fixed)  # fmt: skip
        variable = file.read(names + extras)
        at += _LISTED.size + names + extras + comments
        if len(variable) < names + extras or at > last:
            raise _damaged(source, "its list of files is cut off")
        values = _wide(variable[names:], [size, packed, offset])
        if values is None:
            raise _damaged(source, "sizes of a zip64 are missing")
        size, packed, offset = values
        name = _name(variable[:names], bool(flags & _UTF8))
        is_link = made_by >> 8 == 3 and stat.S_ISLNK(mode >> 16)  # 3: Unix
        if offset + shift + packed > first:
            raise _damaged(source, f"{printable(name)} does not lie in it")
        yield _Listed(name, flags, method, crc, packed, size, offset + shift, is_link)


def _wide(extra: bytes, values: list[int]) -> list[int] | None:
    """Return size, packed size and offset from zip64's extra field; None: missing there."""
    wanted = [i for i, value in enumerate(values) if value == 0xFFFFFFFF]
    at = 0
    while wanted and at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            if length < 8 * len(wanted) or at + 4 + length > len(extra):
                return None
            for place, i in enumerate(wanted):
                (values[i],) = struct.unpack_from("<Q", extra, at + 4 + 8 * place)
            return values
        at += 4 + length
    return None if wanted else values


def _name(raw: bytes, is_utf8: bool) -> str:
    """Decode a file's name: many programs write UTF-8 without the flag, old ones code page 437."""
    raw = raw.partition(b"\0")[0]
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        name = raw.decode("utf-8", "surrogateescape") if is_utf8 else raw.decode("cp437")
    return name if "/" in name else name.replace("\\", "/")


def _refusal(listed: _Listed) -> str:
    """Explain why an image cannot be read, "": it can."""
    if listed.flags & _ENCRYPTED:
        return "encrypted in the zip"
    if listed.is_link:
        return "a link in the zip"
    if listed.method not in (_STORED, _DEFLATED):
        return f"packed in the zip by method {listed.method}: stored and deflated are read"
    return ""


def _entry(file: BinaryIO, listed: _Listed, path: str, source: Path) -> Entry:
    file.seek(listed.offset)
    header = file.read(_LOCAL.size)
    if len(header) < _LOCAL.size or not header.startswith(b"PK\x03\x04"):
        raise _damaged(source, f"{printable(path)} is not where the list of files says")
    *_, names, extras = _LOCAL.unpack(header)
    deflated = listed.method == _DEFLATED
    problem = ""
    if deflated and listed.size > _inflation(listed.size) * listed.packed:
        problem = f"damaged in the zip, or made to fill memory: {listed.size:,} bytes inflated"
    elif not deflated and listed.size != listed.packed:
        problem = "damaged in the zip: two sizes are listed"
    elif listed.packed > 2 * listed.size + _LOCAL.size:
        problem = "damaged in the zip: it is listed as larger than it can be"
    return Entry(
        path,
        str(source),
        listed.offset + _LOCAL.size + names + extras,
        listed.size,
        Packed(listed.packed, deflated, listed.crc),
        problem,
    )


def _inflation(size: int) -> int:
    """Factor by which an image may exceed its packed bytes."""
    return _MOST_INFLATION if size <= _LARGE else _MOST_INFLATION_OF_LARGE


def _starts_as_image(file: BinaryIO, entry: Entry) -> bool:
    """Recognise an image without a suffix by its first bytes."""
    assert entry.packed is not None
    file.seek(entry.offset)
    start = file.read(min(entry.packed.size, 4096))
    if entry.packed.deflated:
        try:
            start = zlib.decompressobj(-zlib.MAX_WBITS).decompress(start, START_BYTES)
        except zlib.error:
            return False
    return bool(image_kind(start[:START_BYTES]))


def _damaged(source: Path, how: str) -> UserError:
    return UserError(f"{source} is damaged ({how}). {_AGAIN}")

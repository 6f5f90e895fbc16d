"""Bytes of a tar at an offset, also of a compressed one."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable
from typing import IO, Any

COMPRESSED: dict[bytes, Callable[[Any, str], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
"""Functions that open, by path or as an open file, a file that begins so."""


Content = Callable[[int, int], bytes]
"""(offset, size) to the bytes there, fewer where they end."""


def content_of(file: IO[bytes]) -> Content:
    """Open the bytes of a file; a decompressing stream goes forward only."""

    def at(offset: int, size: int) -> bytes:
        file.seek(offset)
        return file.read(size)

    return at

"""Headers of tars from outside: ustar, GNU and pax, one after the other.

tarfile takes a damaged header for the end of the archive, reads an extended header of any length at
once, and parses it in quadratic time. Here every length is checked before anything is read, and
time is linear in the bytes read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from moco_scale.untrusted.limits import SHARD_BYTES, TAR_EXTENDED_HEADER
from moco_scale.utils.errors import UserError
from moco_scale.utils.text import printable

BLOCK = 512

FILE, FOLDER, LINK, OTHER = "file", "folder", "link", "special file"
"""Kinds of members."""

_ZEROS = bytes(BLOCK)
_FILES = b"0\x007"
_WITHOUT_CONTENT = b"123456"  # links, devices, folders and pipes: whatever their size says
_LINKS = b"12"
_PAX = b"xX"  # X: Solaris
_RECORD_LENGTH = 8  # digits: an extended header has fewer bytes than that can say
_SIZE = re.compile(rb"[0-9]{1,18}")
_FOR_ALL = (b"path", b"size", b"linkpath")  # no global header can mean these


class TarError(UserError):
    """Tar that cannot be read to its end. The message has the problem and the byte."""


class NoTarError(TarError):
    """The first header is none."""


class Header(NamedTuple):
    """Content of one block."""

    name: str
    """Bytes that are not UTF-8 as surrogates."""
    size: int
    kind: bytes
    """The type flag, one byte."""
    link: str
    """Target of a link."""


class Member(NamedTuple):
    """Member of a tar, and its place."""

    name: str
    """Bytes that are not UTF-8 as surrogates: not fit to be shown."""
    offset: int
    """Bytes of its content."""
    size: int
    kind: str
    link: str
    """Target of a link."""


def parse_header(block: bytes) -> Header:
    """Parse a block of 512 bytes.

    Raises:
        ValueError: It is no header; the text has the reason.
    """
    if len(block) < BLOCK:
        raise ValueError("it is cut off")
    recorded = _octal(block[148:156])
    unsigned = sum(block) - sum(block[148:156]) + 8 * 32
    if recorded != unsigned:
        high = sum(byte >= 128 for byte in block) - sum(byte >= 128 for byte in block[148:156])
        if recorded != unsigned - 256 * high:  # added up as signed bytes, as old programs did
            raise ValueError("its checksum is wrong")
    if block[124] & 0x80:  # base 256
        if block[124] != 0x80:
            raise ValueError("its size is negative, or more than a tar can hold")
        size = int.from_bytes(block[125:136], "big")
    else:
        size = _octal(block[124:136])
    name = block[:100].partition(b"\0")[0]
    if block[257:263] == b"ustar\0":  # GNU's own format keeps other things there
        prefix = block[345:500].partition(b"\0")[0]
        name = prefix + b"/" + name if prefix else name
    kind = block[156:157]
    link = _text(block[157:257].partition(b"\0")[0]) if kind in _LINKS else ""
    return Header(_text(name), size, kind, link)


def _octal(field: bytes) -> int:
    digits = field.lstrip(b"\0 ").partition(b"\0")[0].rstrip(b" ")
    if not digits:
        return 0
    if not digits.isdigit():  # int would take a sign, "0o" and underscores
        raise ValueError("a number in it is none")
    return int(digits, 8)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


class _Said(NamedTuple):
    """Values of extended headers for the next member; None: not given."""

    name: str | None = None
    size: int | None = None
    link: str | None = None


class TarHeaders:
    """Iterates over the members of a tar, in order, up to the empty block that ends it.

    Args:
        at: (offset, size) to the bytes there, fewer where they end.
        what: names the tar in messages: "Shard /data/0.tar".
        again: advice for a damaged one.
        start: offset of the first header.
        end: offset at which the tar ends at the latest; None: unknown, as of a compressed one.

    Attributes:
        at: offset of the next block; after the last member, of the empty one.

    Raises:
        TarError: From the iterator: it is damaged, truncated, no tar, or holds sparse files.
    """

    def __init__(
        self,
        at: Callable[[int, int], bytes],
        what: str,
        again: str,
        start: int = 0,
        end: int | None = None,
    ) -> None:
        self.at = self._start = start
        self._bytes, self._what, self._again = at, what, again
        self._end = SHARD_BYTES if end is None else end

    def problem(self, text: str) -> TarError:
        return TarError(f"{self._what} {text}")

    def __iter__(self) -> Iterator[Member]:
        said, pending = _Said(), False
        while True:
            at = self.at
            block = self._bytes(at, BLOCK) if at + BLOCK <= self._end else b""
            if len(block) < BLOCK:
                raise self._truncated(at)
            if block == _ZEROS:
                if pending:
                    raise self._damaged(at, "what an extended header speaks of does not follow")
                return
            header = self._parse(block, at)
            kind, body = header.kind, at + BLOCK
            extended = kind in b"xXgLK"
            size = header.size if extended or said.size is None else said.size
            if kind in _WITHOUT_CONTENT:
                size = 0
            if body + size > self._end:
                raise self._truncated(at)
            self.at = body + size + -size % BLOCK
            if extended:
                text = self._extended(body, size, at)
                said = self._understood(kind, text, at, said)
                pending = pending or kind != b"g"
                continue
            name, link = said.name or header.name, said.link or header.link
            if kind == b"S":
                raise self._sparse(name)
            yield Member(name, body, size, _kind(kind, name), link)
            if pending:
                said, pending = _Said(), False

    def _parse(self, block: bytes, at: int) -> Header:
        try:
            return parse_header(block)
        except ValueError as error:
            if at == self._start:
                raise NoTarError(f"{self._what} is not a tar. {self._again}") from None
            raise self._damaged(at, str(error)) from None

    def _extended(self, body: int, size: int, at: int) -> bytes:
        if size > TAR_EXTENDED_HEADER:
            raise self.problem(
                f"is damaged, or made to do harm: the extended header at byte {at - self._start} "
                f"claims {size:,} bytes, and none needs more than {TAR_EXTENDED_HEADER:,}. "
                f"{self._again}"
            )
        text = self._bytes(body, size)
        if len(text) < size:
            raise self._truncated(at)
        return text

    def _understood(self, kind: bytes, text: bytes, at: int, said: _Said) -> _Said:
        """Add this extended header to the known values of the next member."""
        if kind == b"L":
            return said._replace(name=_text(text.partition(b"\0")[0]))
        if kind == b"K":
            return said._replace(link=_text(text.partition(b"\0")[0]))
        records = dict[bytes, bytes]()  # of several with one key the last one counts
        for key, value in self._records(text, at):
            if key in _FOR_ALL or key.startswith(b"GNU.sparse"):
                records[key] = value
        if kind == b"g":
            if records:
                raise self.problem(
                    f"has a global header, at byte {at - self._start}, that gives all members one "
                    f"{printable(next(iter(records)))}. Pack it again"
                )
            return said
        name, size, link = records.get(b"path"), records.get(b"size"), records.get(b"linkpath")
        if any(key.startswith(b"GNU.sparse") for key in records):
            raise self._sparse(_text(records.get(b"GNU.sparse.name") or name or b""))
        if name is not None:
            said = said._replace(name=_text(name))
        if link is not None:
            said = said._replace(link=_text(link))
        if size:
            if not _SIZE.fullmatch(size):
                raise self._damaged(at, "a size in it is none")
            said = said._replace(size=int(size))
        return said

    def _records(self, text: bytes, at: int) -> Iterator[tuple[bytes, bytes]]:
        r"""Yield (key, value) of the records "LENGTH KEY=VALUE\n"."""
        start, end = 0, len(text.rstrip(b"\0"))
        while start < end:
            space = text.find(b" ", start, start + _RECORD_LENGTH + 1)
            digits = text[start:space] if space > 0 else b""
            stop = start + int(digits) if digits.isdigit() else start
            equals = text.find(b"=", space, stop)
            if stop > len(text) or equals < 0 or text[stop - 1] != 0x0A:
                raise self._damaged(at, f"a record at its byte {start} is none")
            yield text[space + 1 : equals], text[equals + 1 : stop - 1]
            start = stop

    def _damaged(self, at: int, why: str) -> TarError:
        return self.problem(
            f"is damaged: the header at byte {at - self._start} is not one ({why}). {self._again}"
        )

    def _sparse(self, name: str) -> TarError:
        return self.problem(
            f"holds {printable(name) or 'a file'} as a sparse file, in pieces. Pack it again "
            "without --sparse."
        )

    def _truncated(self, at: int) -> TarError:
        if at == self._end:
            return self.problem(
                f"ends at byte {at - self._start} without the two empty blocks that end a tar, so "
                f"it was most likely cut off. {self._again}"
            )
        end = "" if self._end == SHARD_BYTES else f", byte {self._end - self._start}"
        return self.problem(
            f"is truncated: what begins at byte {at - self._start} goes on after its end{end}. "
            f"{self._again}"
        )


def _kind(flag: bytes, name: str) -> str:
    if flag == b"\0" and name.endswith("/"):  # before there was a flag
        return FOLDER
    if flag in _FILES:
        return FILE
    if flag in _LINKS:
        return LINK
    return FOLDER if flag == b"5" else OTHER

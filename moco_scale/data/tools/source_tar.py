"""Image files in a tar, also in a tar of tars, and in a compressed one.

As in ILSVRC2012_img_train.tar, tars directly in a tar count as folders. Bytes in a plain tar are
later read by offset, by many processes at once. A compressed tar has no offsets: it is decompressed
once, sequentially, into a scratch file.
"""

from __future__ import annotations

import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from moco_scale.data.images.formats import START_BYTES, image_kind, is_image, suffix_of
from moco_scale.data.shards.tar_bytes import COMPRESSED, Content, content_of
from moco_scale.data.tools.sources import Entry, PassedOver
from moco_scale.untrusted.limits import SOURCE_INFLATION, SOURCE_INFLATION_FROM
from moco_scale.untrusted.tar_headers import BLOCK, FILE, LINK, Member, TarHeaders
from moco_scale.utils.errors import UserError
from moco_scale.utils.progress import bar
from moco_scale.utils.text import printable

UNPACKED = "unpacked-"  # how the names of decompressed tars begin
_UNREADABLE = {b"\x28\xb5\x2f\xfd": "Zstandard", b"7z\xbc\xaf": "7-Zip", b"Rar!": "RAR"}
_AGAIN = "Fetch it again."
_COPY_BYTES = 1 << 20
_CHECKED_TAIL = 1 << 20


def scan_tar(source: Path, tar: Path, passed: PassedOver) -> Iterator[Entry]:
    """List image files in a tar, and in the tars directly in it.

    Args:
        source: path of the user's file, for messages.
        tar: path of the plain tar.
        passed: counts other files.

    Raises:
        UserError: It is no tar, is damaged or truncated, or holds links or sparse files instead of
            images.
        OSError: It cannot be read.
    """
    with tar.open("rb") as file, tar.open("rb") as inner_file:
        end = os.fstat(file.fileno()).st_size
        if end < BLOCK:
            raise UserError(f"{source} is not a tar: it has {end} bytes. {_AGAIN}")
        for member, path in _named(content_of(file), str(source), 0, end, passed):
            if member.kind != FILE or suffix_of(path) != ".tar":
                yield from _entry(member, path, tar, content_of(file), source, passed)
                continue
            inside = f"{printable(member.name)} in {source}"
            place = member.offset, member.offset + member.size
            for inner, name in _named(content_of(inner_file), inside, *place, passed):
                whole = f"{path[: -len('.tar')]}/{name}"
                yield from _entry(inner, whole, tar, content_of(inner_file), source, passed)


def _named(
    content: Content, what: str, start: int, end: int, passed: PassedOver
) -> Iterator[tuple[Member, str]]:
    """Yield the members of a tar that are not hidden, with their paths in it."""
    headers = TarHeaders(content, what, _AGAIN, start, end)
    for member in headers:
        path = passed.path_of(member.name)
        if path is not None:
            yield member, path
    # What stands after the end nobody would read.
    if content(headers.at, min(end - headers.at, _CHECKED_TAIL)).strip(b"\0"):
        raise headers.problem(
            f"goes on after its end at byte {headers.at - start}: two tars in one file, or a "
            "damaged one. Unpack it with tar --ignore-zeros and name the folder."
        )


def _entry(
    member: Member, path: str, tar: Path, content: Content, source: Path, passed: PassedOver
) -> Iterator[Entry]:
    named = is_image(path)
    if member.kind == LINK and named:
        raise UserError(
            f"{source} holds links instead of images ({printable(member.name)} -> "
            f"{printable(member.link)}). Pack it with tar --dereference --hard-dereference."
        )
    if member.kind != FILE:
        return
    unnamed = bool(path) and not suffix_of(path)
    if named or (unnamed and image_kind(content(member.offset, START_BYTES))):
        yield Entry(path, str(tar), member.offset, member.size)
    else:
        passed.other(path)


def decompressed(path: Path) -> IO[bytes]:
    """Open a file, decompressed if its first bytes require it. Raises OSError."""
    return (_opener(path) or Path.open)(path, "rb")


def _opener(path: Path) -> Callable[[Any, str], Any] | None:
    """Find the decompressor of a file; None: it is not compressed.

    Raises:
        UserError: None here can.
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(8)
    for magic, kind in _UNREADABLE.items():
        if start.startswith(magic):
            raise UserError(f"{path} is a {kind} archive: unpack it, and name the folder.")
    return next((o for magic, o in COMPRESSED.items() if start.startswith(magic)), None)


def plain_tar(source: Path, scratch: Path) -> Path:
    """Return the source itself, or the new file in scratch that it was decompressed to.

    Raises:
        UserError: It is damaged, of an unknown kind, has no room, or is a bomb.
        OSError: It cannot be read.
    """
    opener = _opener(source)
    if opener is None:
        return source
    plain = scratch / f"{UNPACKED}{sum(1 for _ in scratch.glob(f'{UNPACKED}*'))}.tar"
    most = SOURCE_INFLATION_FROM + SOURCE_INFLATION * source.stat().st_size
    written = 0
    with (
        opener(source, "rb") as packed,
        plain.open("xb") as unpacked,
        bar(f"decompressing {source.name}", "B", unit_scale=True) as progress,
    ):
        while True:
            try:
                block = packed.read(_COPY_BYTES)
            except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
                raise UserError(f"{source} is truncated or damaged ({error}). {_AGAIN}") from error
            if not block:
                return plain
            written += len(block)
            if written > most:
                raise UserError(
                    f"{source} decompresses to more than {SOURCE_INFLATION} times its size, which "
                    "images do not: it is most likely made to fill disks."
                )
            try:
                unpacked.write(block)
            except OSError as error:
                raise UserError(
                    f"Cannot decompress {source} to {scratch}: {error.strerror or error}. A "
                    "compressed tar is first decompressed next to the shards, so there must be "
                    "room for its images twice."
                ) from error
            progress.update(len(block))

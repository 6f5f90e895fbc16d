"""Where pictures come from: lists them, with the place of their bytes, without unpacking anything.

A source is a folder, a tar (also one of tars, as ILSVRC2012_img_train.tar, whose members count as
folders), or a compressed tar. Bytes in a plain tar are later read by offset, by many processes at
once. A compressed tar has no offsets: it is decompressed once, sequentially, into a scratch file.
"""

from __future__ import annotations

import bz2
import gzip
import itertools
import lzma
import os
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple

from tqdm import tqdm

from moco_scale.errors import UserError
from moco_scale.untrusted.text import printable

JPEG_SUFFIXES = frozenset((".jpg", ".jpeg", ".jpe", ".jfif"))
PICTURE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp"),
    *(".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"),
)

# by the bytes that such a file begins with
_KINDS = {
    b"\xff\xd8\xff": "jpeg",
    b"\x89PNG": "png",
    b"RIFF": "webp",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\0": "tiff",
    b"MM\0*": "tiff",
    b"P5": "pgm",
    b"P6": "ppm",
}
_COMPRESSED: dict[bytes, Callable[[Path], IO[bytes]]] = {
    b"\x1f\x8b": gzip.GzipFile,  # type: ignore[dict-item]
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
}
_AGAIN = "Fetch it again."
_COPY_BYTES = 1 << 20
UNPACKED = "unpacked-"  # how the names of decompressed tars begin


class Entry(NamedTuple):
    """One picture file of a source."""

    path: str  # below the source, with "/": "train/n01440764/n01440764_18.JPEG"
    container: str  # the file to open: the picture itself, or the tar it lies in
    offset: int  # of the first byte in the container
    size: int  # bytes


def scan(source: Path, scratch: Path) -> list[Entry]:
    """All pictures of a source, sorted by path.

    scratch: a folder on a disk with room; a compressed tar is decompressed to a file in it.

    Raises UserError: no such file, not readable, not a tar, a truncated or damaged tar, the same
    path twice, links in a tar, no pictures.
    """
    with tqdm(
        desc=f"listing {printable(source.name)}",
        unit=" pictures",
        disable=not sys.stderr.isatty(),
        leave=False,
    ) as bar:
        try:
            if source.is_dir():
                found = _scan_folder(source)
            elif source.exists():
                found = _scan_tar(source, _plain_tar(source, scratch))
            else:
                raise UserError(f"There is no source {source}.")
            entries = []
            for entry in found:
                entries.append(entry)
                bar.update()
        except tarfile.TarError as error:
            raise UserError(f"Cannot read {source} as a tar: {error}.") from error
        except OSError as error:
            where = error.filename or source
            raise UserError(f"Cannot read {where}: {error.strerror or error}.") from error
    if not entries:
        raise UserError(f"{source} holds no pictures. {_what_is_there(source)}")
    entries.sort()
    for before, after in itertools.pairwise(entries):
        if before.path == after.path:
            raise UserError(
                f"{source} holds {before.path} twice. Make the tar again, or unpack it to a folder "
                "(the later one then wins) and use that."
            )
    return entries


def holds_pictures(folder: Path) -> bool:
    """Whether there are pictures in a folder, not counting those in tars. Raises OSError."""
    return next(_scan_folder(folder), None) is not None


def is_picture(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in PICTURE_SUFFIXES


def picture_kind(start: bytes) -> str:
    """What a picture that begins with these bytes, at least four, is: "jpeg", "png", …; "": none
    that is known."""
    return next((kind for magic, kind in _KINDS.items() if start.startswith(magic)), "")


def _parts(path: str) -> list[str] | None:
    """The components of a member's name; None for what file managers hide."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if any(part.startswith(".") and part != ".." for part in parts) or "__MACOSX" in parts:
        return None
    return parts


def _scan_folder(top: Path) -> Iterator[Entry]:
    """Pictures below a folder; links are followed, a link to a folder above itself is not."""

    def walk(folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[Entry]:
        status = os.stat(folder)
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            return
        with os.scandir(folder) as children:
            for child in children:
                if _parts(child.name) is None:
                    continue
                if child.is_dir():
                    yield from walk(child.path, f"{prefix}{child.name}/", above | {identity})
                elif is_picture(child.name):
                    yield Entry(prefix + child.name, child.path, 0, child.stat().st_size)

    return walk(str(top), "", frozenset())


def _scan_tar(source: Path, tar: Path) -> Iterator[Entry]:
    """Pictures in a tar, and in the tars directly in it. source: the name for messages."""
    with tar.open("rb") as file, tar.open("rb") as inner_file:
        end = os.fstat(file.fileno()).st_size
        for member in _members(file, 0, end, str(source)):
            parts = _parts(member.name)
            if parts is None:
                continue
            if is_picture(member.name):
                yield Entry("/".join(parts), str(tar), member.offset_data, member.size)
            elif member.name.endswith(".tar"):
                folder = "/".join(parts).removesuffix(".tar")
                first, last = member.offset_data, member.offset_data + member.size
                for inner in _members(inner_file, first, last, f"{member.name} in {source}"):
                    inner_parts = _parts(inner.name)
                    if inner_parts is not None and is_picture(inner.name):
                        path = "/".join([folder, *inner_parts])
                        yield Entry(path, str(tar), inner.offset_data, inner.size)


def _members(file: BinaryIO, start: int, end: int, name: str) -> Iterator[tarfile.TarInfo]:
    """Regular files of the tar that lies at [start, end) of a file.

    tarfile takes most damage for the end of the archive; this does not. Raises UserError.
    """
    file.seek(start)
    at = start
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            at = tar.offset  # opening has read the first header
            while (member := tar.next()) is not None:
                # Or the headers of a million files stay in memory.
                tar.members.clear()  # type: ignore[attr-defined]
                at = tar.offset
                if member.offset_data + member.size > end:
                    raise UserError(
                        f"{name} is truncated: {member.name} is not complete in it. {_AGAIN}"
                    )
                if (member.issym() or member.islnk()) and is_picture(member.name):
                    raise UserError(
                        f"{name} holds links instead of pictures ({member.name} -> "
                        f"{member.linkname}). Pack it with tar --dereference --hard-dereference."
                    )
                if member.isreg():
                    yield member
            at = tar.offset
    except tarfile.TarError as error:
        if at == start:
            raise UserError(
                f"{name} is not a tar, or its beginning is damaged ({error})."
            ) from error
        raise UserError(f"{name} is truncated or damaged at byte {at - start}. {_AGAIN}") from error
    file.seek(at)
    block = file.read(tarfile.BLOCKSIZE)
    if at + tarfile.BLOCKSIZE > end or block.strip(b"\0"):
        raise UserError(
            f"{name} is truncated or damaged: neither a file nor the end mark at byte "
            f"{at - start} of {end - start}. {_AGAIN}"
        )


def _plain_tar(source: Path, scratch: Path) -> Path:
    """The source itself, or the file it was decompressed to."""
    with source.open("rb") as file:
        magic = file.read(8)
    opener = next((o for start, o in _COMPRESSED.items() if magic.startswith(start)), None)
    if opener is None:
        return source
    plain = scratch / f"{UNPACKED}{source.name}.tar"
    with (
        opener(source) as packed,
        plain.open("wb") as unpacked,
        tqdm(
            desc=f"decompressing {source.name}",
            unit="B",
            unit_scale=True,
            disable=not sys.stderr.isatty(),
            leave=False,
        ) as bar,
    ):
        while True:
            try:
                block = packed.read(_COPY_BYTES)
            except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
                raise UserError(f"{source} is truncated or damaged ({error}). {_AGAIN}") from error
            if not block:
                return plain
            try:
                unpacked.write(block)
            except OSError as error:
                raise UserError(
                    f"Cannot decompress {source} to {scratch}: {error.strerror or error}. A "
                    "compressed tar is first decompressed next to the shards, so there must be "
                    "room for its pictures twice."
                ) from error
            bar.update(len(block))


def _what_is_there(source: Path) -> str:
    """A hint for a source without pictures."""
    suffixes = " ".join(sorted(PICTURE_SUFFIXES))
    if not source.is_dir():
        return f"Pictures are files that end in {suffixes}."
    names = sorted(child.name for child in source.iterdir())
    if not names:
        return "The folder is empty."
    tars = [name for name in names if name.endswith((".tar", ".tar.gz", ".tgz"))]
    if tars:
        return f"To take the pictures in a tar, name it: --source {source / tars[0]}"
    shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    return f"Pictures are files that end in {suffixes}; the folder holds {shown}."

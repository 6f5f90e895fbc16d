"""Recognition of a single tar by the names of its first members."""

from __future__ import annotations

import contextlib
import lzma
import os
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

from moco_scale.data.images.formats import is_hidden, is_image
from moco_scale.data.shards.tar_bytes import COMPRESSED, content_of
from moco_scale.data.shards.tar_scan import image_key, split_name
from moco_scale.untrusted.limits import TAR_LOOKED_INTO
from moco_scale.untrusted.tar_headers import FILE, FOLDER, Member, NoTarError, TarError, TarHeaders
from moco_scale.utils.text import printable

_LOOKED_AT = 64
_LABELS = (".cls", ".json")


class Seems(NamedTuple):
    """Guess at a tar's content from its first members."""

    images: bool
    folders: bool
    """Images lie in folders, which may be classes."""
    labelled: str
    """An image and the member that labels it, as WebDataset has it; "": none. Fit to be shown."""
    unusable: bool
    """A tar, not compressed, of which scanning it says why it cannot be used."""


def look_into(tar: Path) -> Seems:
    """Guess the content of a tar, compressed or not; nothing for an unreadable one.

    Between headers nothing is read unless it is compressed: a member may be a tar itself.
    """
    first, damaged = _first_members(tar, _LOOKED_AT)
    names = [member.name.removeprefix("./") for member in first if member.kind == FILE]
    names = [name for name in names if not any(map(is_hidden, name.split("/")[:-1]))]
    images = {image_key(name): name for name in names if is_image(name)}
    labels = {image_key(name): name for name in names if name.lower().endswith(_LABELS)}
    both = next((key for key in images if key in labels), None)
    labelled = "" if both is None else printable(f"{images[both]} and {labels[both]}")
    folders = any("/" in name for name in images.values())
    links = any(m.kind not in (FILE, FOLDER) and is_image(m.name) for m in first)
    nameless = bool(names) and not any(split_name(name)[0] for name in names)
    unusable = damaged or links or nameless
    return Seems(bool(images), folders, labelled, unusable)


def first_members(tar: Path, count: int) -> list[Member]:
    """List the first members of a tar, compressed or not, as far as readable.

    At most 64 MB are decompressed.
    """
    return _first_members(tar, count)[0]


def _first_members(tar: Path, count: int) -> tuple[list[Member], bool]:
    """List them, and tell whether an uncompressed tar is damaged among them."""
    with contextlib.suppress(OSError, EOFError, zlib.error, lzma.LZMAError), tar.open("rb") as file:
        end = os.fstat(file.fileno()).st_size
        found, error = _members(file, count, end)
        if not isinstance(error, NoTarError):
            return found, error is not None
        file.seek(0)
        start = file.read(8)
        opener = next((o for magic, o in COMPRESSED.items() if start.startswith(magic)), None)
        if opener is not None:
            file.seek(0)
            with opener(file, "rb") as unpacked:
                return _members(unpacked, count, TAR_LOOKED_INTO)[0], False
    return [], False


def _members(file: BinaryIO, count: int, end: int) -> tuple[list[Member], Exception | None]:
    """List the first members of a tar, and the error that ended the list early."""
    found: list[Member] = []
    try:
        for member in TarHeaders(content_of(file), "", "", end=end):
            found.append(member)  # one by one: those before a damage count
            if len(found) == count:
                break
    except (TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        return found, error
    return found, None

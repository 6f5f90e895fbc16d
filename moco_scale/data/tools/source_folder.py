"""Image files below a folder, with its links, pipes and unreadable files."""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

from moco_scale.data.images.formats import START_BYTES, image_kind, is_image, suffix_of
from moco_scale.data.tools.sources import Entry, PassedOver
from moco_scale.utils.errors import UserError
from moco_scale.utils.text import printable, some_of

NOT_READABLE = frozenset((errno.EACCES, errno.EPERM, errno.ELOOP))
"""Errors of one file and not of the disk: the file is skipped and listed."""
_MOST_PLACES = 64

_Identity = tuple[int, int]  # device, inode


def scan_folder(top: Path, passed: PassedOver, without: Collection[Path] = ()) -> Iterator[Entry]:
    """Find image files below a folder; links are followed, except to a folder above.

    Args:
        top: the folder.
        passed: counts other files.
        without: folders to skip.

    Raises:
        UserError: Folders cannot be read, or links lead to a folder in very many ways.
        OSError: The folder itself cannot be read.
    """
    left_alone = {_identity(os.stat(path)) for path in without if path.is_dir()}
    places: Counter[_Identity] = Counter()
    unreadable: list[str] = []
    # Not by recursion: folders may be nested deeper than Python calls itself.
    waiting: list[tuple[str, str, frozenset[_Identity]]] = [(str(top), "", frozenset())]
    while waiting:
        folder, prefix, above = waiting.pop()
        try:
            identity = _identity(os.stat(folder))
            if identity in above or identity in left_alone:
                continue
            places[identity] += 1
            if places[identity] > _MOST_PLACES:
                raise UserError(
                    f"{top}: links lead to the folder {printable(folder)} in more than "
                    f"{_MOST_PLACES} ways. Remove some, or name a folder that has fewer."
                )
            with os.scandir(folder) as children:
                for child in children:
                    if passed.is_hidden(child.name):
                        continue
                    if _is_folder(child):
                        inside = f"{prefix}{child.name}/"
                        waiting.append((child.path, inside, above | {identity}))
                    else:
                        yield from _file(child, prefix + child.name, passed)
        except OSError as error:
            if not prefix:
                raise
            unreadable.append(f"{printable(folder)} ({error.strerror or error})")
    if unreadable:
        raise UserError(
            f"{top}: {len(unreadable)} folder{'s' * (len(unreadable) != 1)} cannot be read: "
            f"{some_of(unreadable)}. Make them readable, or move them away: "
            "what is in them may be classes."
        )


def _identity(status: os.stat_result) -> _Identity:
    return status.st_dev, status.st_ino


def _is_folder(child: os.DirEntry[str]) -> bool:
    try:
        return child.is_dir()
    except OSError:  # a link that nobody can follow
        return False


def _file(child: os.DirEntry[str], path: str, passed: PassedOver) -> Iterator[Entry]:
    named = is_image(path)
    try:
        status = child.stat()
    except FileNotFoundError:
        problem = "a link to nothing"
    except OSError as error:
        problem = f"cannot be read: {error.strerror or error}"
    else:
        if not stat.S_ISREG(status.st_mode):
            problem = "no file, but a pipe, a socket or a device"
        elif named or (not suffix_of(path) and _is_image(child.path)):
            yield Entry(path, child.path, 0, status.st_size)
            return
        else:
            passed.other(path)
            return
    if named:
        yield Entry(path, child.path, 0, 0, problem=problem)
    else:
        passed.other(path)


def _is_image(path: str) -> bool:
    """Recognise an image without a suffix by its first bytes."""
    try:
        with open(path, "rb") as file:
            return bool(image_kind(file.read(START_BYTES)))
    except OSError:
        return False

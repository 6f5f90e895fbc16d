"""List of a source's image files, with the places of their bytes, without unpacking."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from pathlib import Path

from moco_scale.data.images.formats import IMAGE_SUFFIXES
from moco_scale.data.tools.source_folder import scan_folder
from moco_scale.data.tools.source_tar import plain_tar, scan_tar
from moco_scale.data.tools.source_zip import is_zip, scan_zip
from moco_scale.data.tools.sources import Entry, PassedOver
from moco_scale.utils.errors import UserError
from moco_scale.utils.progress import bar
from moco_scale.utils.text import printable


def scan(
    source: Path, scratch: Path, without: Collection[Path] = ()
) -> tuple[list[Entry], list[str]]:
    """List all image files of a source, sorted by path, with notes on skipped files.

    Args:
        source: a folder, a tar (also one of tars, or compressed), or a zip.
        scratch: a folder on a disk with room, to decompress a tar to.
        without: folders to skip.

    Raises:
        UserError: The source is missing, unreadable, no archive, truncated or damaged, has the same
            path twice or links in a tar, or no images.
    """
    passed = PassedOver()
    entries = []
    try:
        with bar(f"listing {source.name}", " images") as progress:
            for entry in _entries(source, scratch, passed, without):
                entries.append(entry)
                progress.update()
    except OSError as error:
        where = error.filename or source
        raise UserError(f"Cannot read {printable(where)}: {error.strerror or error}.") from error
    notes = passed.notes(source)
    if not entries:
        said = "".join(f" {note[0].upper()}{note[1:]}." for note in notes)
        raise UserError(f"{source} holds no images.{said} {_what_is_there(source)}")
    entries.sort(key=lambda entry: entry.path)
    for before, after in itertools.pairwise(entries):
        if before.path == after.path:
            raise UserError(
                f"{source} holds {printable(before.path)} twice. Make the archive again, or unpack "
                "it to a folder (the later one then wins) and use that."
            )
    return entries, notes


def holds_images(folder: Path) -> bool:
    """Tell whether a folder has images, not counting archives. Raises OSError."""
    return next(scan_folder(folder, PassedOver()), None) is not None


def _entries(
    source: Path, scratch: Path, passed: PassedOver, without: Collection[Path]
) -> Iterator[Entry]:
    if source.is_dir():
        return scan_folder(source, passed, without)
    if not source.exists():
        raise UserError(f"There is no source {source}.")
    if not source.is_file():
        raise UserError(f"{source} is no file and no folder, but a pipe, a socket or a device.")
    with source.open("rb") as file:
        start = file.read(4)
    if is_zip(source, start):
        return scan_zip(source, passed)
    return scan_tar(source, plain_tar(source, scratch), passed)


def _what_is_there(source: Path) -> str:
    """Give a hint for a source without images."""
    suffixes = f"Images are files that end in {' '.join(sorted(IMAGE_SUFFIXES))}."
    if not source.is_dir():
        return suffixes
    names = sorted(child.name for child in source.iterdir())
    if not names:
        return "The folder is empty."
    ends = (".tar", ".tar.gz", ".tgz", ".zip")
    archives = [name for name in names if name.lower().endswith(ends)]
    if archives:
        return f"To take the images in an archive, name it: --source {source / archives[0]}"
    shown = ", ".join(printable(name, 60) for name in names[:5])
    return f"{suffixes} The folder holds {shown}{', …' if len(names) > 5 else ''}."

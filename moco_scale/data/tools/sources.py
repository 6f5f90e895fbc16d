"""Entries of a source of images, and counts of skipped files.

A source is a folder, a tar or a zip. ``source_scan`` lists one; folders, tars and zips each have a
module of their own, and all three follow the rules here.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from typing import NamedTuple

from moco_scale.data.images.formats import is_hidden, suffix_of
from moco_scale.utils.text import printable

_CONVERT = "convert it, for example with `magick mogrify -format jpg`"
_ADVICE = {
    **dict.fromkeys((".heic", ".heif", ".hif"), f"HEIC is not decoded here: {_CONVERT}"),
    ".avif": f"this Pillow decodes no AVIF: pip install -U pillow, or {_CONVERT}",
    **dict.fromkeys(
        (".jp2", ".j2k", ".jpx", ".jxl", ".svg", ".psd", ".dng", ".cr2", ".nef", ".arw"),
        f"not decoded here: {_CONVERT}",
    ),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".gz"), "name it as the --source to take it"),
}
_MOST_SUFFIXES = 1000  # that are told apart: files may be numbered by theirs
_SHOWN = 12


class Packed(NamedTuple):
    """Place of an image's bytes in a zip."""

    size: int  # bytes in the container
    deflated: bool
    crc: int  # CRC-32 of the image


class Entry(NamedTuple):
    """Image file of a source."""

    path: str  # below the source, with "/": "train/n01440764/n01440764_18.JPEG"
    container: str  # the file to open: the image itself, or the archive it lies in
    offset: int  # of the first byte in the container
    size: int  # bytes
    packed: Packed | None = None  # None: the bytes lie there as they are
    problem: str = ""  # why it cannot be taken; "": nothing is known against it


class PassedOver:
    """Counts files of a source that are no images."""

    def __init__(self) -> None:
        self._hidden: Counter[str] = Counter()
        self._others: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def is_hidden(self, name: str) -> bool:
        """Tell whether a path's component is a system's or hidden, and count it then."""
        if not is_hidden(name):
            return False
        shown = "._…" if name.startswith("._") else name
        self._hidden[shown if len(self._hidden) < _MOST_SUFFIXES else "…"] += 1
        return True

    def path_of(self, name: str) -> str | None:
        """Return an archive member's path below the archive; None: hidden, counted.

        A leading ``/`` and ``..`` lead nowhere: nothing is unpacked.
        """
        path = posixpath.normpath("/" + name).lstrip("/")
        return None if any(map(self.is_hidden, path.split("/"))) else path

    def other(self, path: str) -> None:
        """Count a file that is no image."""
        suffix = suffix_of(path)
        if len(suffix) > 12 or len(self._others) >= _MOST_SUFFIXES:
            suffix = "…"  # no suffix, but what follows a dot
        self._others[suffix] += 1
        self._examples.setdefault(suffix, path)

    def notes(self, source: object) -> list[str]:
        """Return notes for the user, a line each."""
        lines = []
        if self._hidden:
            kinds = ", ".join(f"{n} x {printable(name, 40)}" for name, n in _most(self._hidden))
            lines.append(f"skipped in {source}, hidden or left by a system: {kinds}")
        if self._others:
            count = self._others.total()
            kinds = ", ".join(
                f"{n} x {printable(suffix) if suffix else 'no suffix'} "
                f"(as {printable(self._examples.get(suffix, '…'), 80)})"
                for suffix, n in _most(self._others)
            )
            lines.append(
                f"skipped in {source}: {count} file{'s' * (count != 1)} that "
                f"{'is' if count == 1 else 'are'} no image by name: {kinds}"
            )
            lines += [
                f"{suffix}: {_ADVICE[suffix]}" for suffix in self._others if suffix in _ADVICE
            ]
        return lines


def _most(counts: Counter[str]) -> list[tuple[str, int]]:
    shown = counts.most_common(_SHOWN)
    rest = counts.total() - sum(n for _, n in shown)
    return [*shown, ("…", rest)] if rest else shown

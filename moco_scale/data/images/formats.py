"""Formats of images: by name, by first bytes, and guesses at other files."""

from __future__ import annotations

import os
import re

from PIL import features

_KINDS: tuple[tuple[str, re.Pattern[bytes]], ...] = tuple(
    (kind, re.compile(pattern, re.DOTALL))
    for kind, pattern in (
        ("JPEG", rb"\xff\xd8\xff"),
        ("PNG", rb"\x89PNG\r\n\x1a\n"),
        ("WEBP", rb"RIFF....WEBP"),
        ("GIF", rb"GIF8[79]a"),
        ("TIFF", rb"II[*+]\0|MM\0[*+]"),
        ("AVIF", rb"....ftyp(?:avi[fs]|m[is]f1(?:.{4})*?avi[fs])"),
        ("JPEG2000", rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n"),
        ("PPM", rb"P[1-6][\s#]"),
        ("BMP", rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0"),  # text may begin so
    )
)
"""By Pillow's names. Photographs come in these; none of them runs a program."""

_OTHERS: tuple[tuple[str, re.Pattern[bytes]], ...] = tuple(
    (name, re.compile(pattern, re.DOTALL | re.IGNORECASE))
    for name, pattern in (
        (
            "a Git LFS pointer, which stands for the file: fetch it by `git lfs pull`",
            rb"version https://git-lfs\.github\.com/",
        ),
        ("HEIC: convert it to JPEG", rb"....ftyp(?:hei[cxms]|hev[cmxs]|m[is]f1)"),
        ("JPEG XL: convert it to JPEG", rb"\xff\x0a|\0\0\0\x0cJXL "),
        ("a video", rb"....ftyp|\x1a\x45\xdf\xa3|RIFF....AVI |\0\0\x01[\xb3\xba]"),
        ("HTML, perhaps a server's error", rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype\s+html|html|head)"),
        ("SVG or other XML", rb"(?:\xef\xbb\xbf)?\s*<(?:\?xml|svg)"),
        ("PostScript", rb"%!PS|\xc5\xd0\xd3\xc6"),
        ("PDF", rb"%PDF"),
        ("a zip archive", rb"PK\x03\x04"),
        ("compressed by gzip, bzip2, xz or zstd", rb"\x1f\x8b|BZh|\xfd7zXZ\0|\x28\xb5\x2f\xfd"),
        ("Photoshop's PSD", rb"8BPS"),
        ("an icon", rb"\0\0[\x01\x02]\0|icns"),
        ("numpy's array", rb"\x93NUMPY"),
        ("a file of zeros, perhaps never written", rb"\0{16}"),
        ("text", rb"[\t\n\r\x20-\x7e]{4,}\Z"),
    )
)
_START = 512
START_BYTES = 64
"""By so many first bytes `image_kind` knows an image."""


def image_kind(data: bytes | memoryview) -> str | None:
    """Return Pillow's name of the format that `data` begins as; None for other files."""
    start = bytes(data[:START_BYTES])
    for kind, pattern in _KINDS:
        if pattern.match(start):
            return kind
    return None


def no_image(data: bytes | memoryview) -> str:
    """Describe `data` that is no image of a known format."""
    start = bytes(data[:_START])
    if not start:
        return "empty file"
    what = next((name for name, pattern in _OTHERS if pattern.match(start)), None)
    return "not an image in any known format" + (f" ({what})" if what else "")


JPEG_SUFFIXES = frozenset((".jpg", ".jpeg", ".jpe", ".jfif"))


IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp"),
    *(".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"),
    *((".avif",) if features.check("avif") else ()),
    *((".jp2", ".j2k") if features.check("jpg_2000") else ()),
)


LFS_POINTER = b"version https://git-lfs.github.com/spec/"


_SUFFIXES = {
    **{"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "TIFF": ".tiff"},
    **{"AVIF": ".avif", "JPEG2000": ".jp2", "PPM": ".ppm", "BMP": ".bmp"},
}
"""Suffix of images of a kind."""


# Files of systems and programs among a user's, in lower case. Names that begin with a dot
# are theirs too: .AppleDouble, ._x.jpg, .ipynb_checkpoints, .Trash, .thumbnails, …
_SYSTEM = frozenset(
    (
        *("@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "__macosx"),
        *("$recycle.bin", "recycler", "system volume information", "lost+found", "found.000"),
        *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__pycache__"),
    )
)


def is_hidden(name: str) -> bool:
    """Tell whether a path's component is hidden, or a system's leftover."""
    return name.casefold() in _SYSTEM or (name.startswith(".") and name not in (".", ".."))


def suffix_of(path: str) -> str:
    """Return the suffix of an image's name, in lower case, with its dot; "" without one."""
    return os.path.splitext(path)[1].lower()


def is_image(path: str) -> bool:
    """Tell an image file by its name."""
    return suffix_of(path) in IMAGE_SUFFIXES


def suffix_by_content(start: bytes) -> str:
    """Return the suffix of an image that begins with these bytes; else JPEG's."""
    return _SUFFIXES[image_kind(start) or "JPEG"]


def suffix_to_write(path: str, start: bytes) -> str:
    """Return the suffix of an image in a shard: its name's, else by its first bytes."""
    suffix = suffix_of(path)
    if suffix not in IMAGE_SUFFIXES:
        suffix = suffix_by_content(start)
    return ".jpg" if suffix in JPEG_SUFFIXES else suffix

"""Fuzz target: a zip as a source of images, listed and unpacked."""

from __future__ import annotations

import contextlib
import io
import zipfile
from pathlib import Path

from moco_scale.data.decode import DecodeError
from moco_scale.data.layout import Picture
from moco_scale.data.shard_file import close_sources, source_bytes
from moco_scale.data.source_scan import scan
from moco_scale.errors import UserError

_NAMES = ("train/a/0.jpg", "../../etc/b.png", "C\\d\\e.jpg", "none", "t.txt", "@eaDir/x.jpg")


def SEEDS() -> list[bytes]:
    """Return zips as zipfile writes them: stored, deflated, zip64, empty, with a comment."""
    seeds = []
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2):
        for wide in (False, True):
            stream = io.BytesIO()
            with zipfile.ZipFile(stream, "w", method) as archive:
                for name in _NAMES:
                    with archive.open(name, "w", force_zip64=wide) as file:
                        file.write(b"\xff\xd8\xff" + name.encode() * 30)
                archive.comment = b"PK" * wide
            seeds.append(stream.getvalue())
    stream = io.BytesIO()
    zipfile.ZipFile(stream, "w").close()
    return [*seeds, stream.getvalue()]


def run(data: bytes, folder: Path) -> None:
    """List one zip and read its images; a UserError is an answer, anything else is not."""
    source = folder / "x.zip"
    source.write_bytes(data)
    try:
        with contextlib.suppress(UserError):
            for entry in scan(source, folder)[0]:
                if not entry.problem:
                    place = entry.container, entry.offset, entry.size
                    with contextlib.suppress(DecodeError):  # of one image, which is left out
                        source_bytes(Picture(entry.path, *place, -1, entry.packed))
    finally:
        close_sources()

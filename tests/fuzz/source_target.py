"""Fuzz target: a zip or a tar as a source of images, listed, sorted into classes and read."""

from __future__ import annotations

import contextlib
import io
import itertools
import tarfile
import zipfile
from pathlib import Path

from moco_scale.data.images.decode import DecodeError
from moco_scale.data.tools.layout import arrange
from moco_scale.data.tools.shard_file import close_sources, source_bytes
from moco_scale.data.tools.source_scan import scan
from moco_scale.utils.errors import UserError
from moco_scale.utils.text import printable

_NAMES = (
    *("Train/a/0.jpg", "Train/b/none", "Val/a/1.jpg", "../../etc/b.png", "C\\d\\e.jpg"),
    *("t.txt", "@eaDir/x.jpg", "Train/na\u0308h/2.jpg", "Train/" + "x" * 200 + "/3.jpg"),
)


def SEEDS() -> list[bytes]:
    """Return zips and tars as Python writes them, and an empty zip."""
    seeds = []
    for names in (_NAMES, _NAMES[:3]):
        for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2):
            stream = io.BytesIO()
            with zipfile.ZipFile(stream, "w", method) as packing:
                for name in names:
                    with packing.open(name, "w", force_zip64=method == zipfile.ZIP_STORED) as file:
                        file.write(_image(name))
                packing.comment = b"PK"
            seeds.append(stream.getvalue())
        for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
            for mode in ("w", "w:gz"):
                stream = io.BytesIO()
                with tarfile.open(fileobj=stream, mode=mode, format=kind) as archive:
                    for name in names:
                        member = tarfile.TarInfo(name)
                        member.size = len(_image(name))
                        archive.addfile(member, io.BytesIO(_image(name)))
                seeds.append(stream.getvalue())
    stream = io.BytesIO()
    zipfile.ZipFile(stream, "w").close()
    return [*seeds, stream.getvalue()]


def run(data: bytes, folder: Path) -> None:
    """Read one archive; a UserError is an answer, anything else is not."""
    source = folder / "source"
    source.write_bytes(data)
    try:
        with contextlib.suppress(UserError):
            entries, notes = scan(source, folder)
            listing = arrange(str(source), entries)
            for line in (*notes, *listing.notes):
                assert line == printable(line, len(line)), line
            for image in itertools.chain(*listing.splits.values()):
                with contextlib.suppress(DecodeError):  # of one image, which is left out
                    source_bytes(image)
    finally:
        close_sources()
        for unpacked in folder.glob("unpacked-*"):
            unpacked.unlink()


def _image(name: str) -> bytes:
    return b"\xff\xd8\xff" + name.encode() * 3

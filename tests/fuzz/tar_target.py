"""What the fuzz harness feeds to the reader of tars; only a UserError may pass."""

from __future__ import annotations

import contextlib
import io
import tarfile
from pathlib import Path

import numpy as np

from moco_scale.data.shards.header_check import tar_problem
from moco_scale.data.shards.index_file import INDEX_DTYPE
from moco_scale.data.shards.recognise import look_into
from moco_scale.data.shards.tar_scan import key_in, member_places, scan_tar
from moco_scale.data.tools.salvage import salvage
from moco_scale.utils.errors import UserError

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


def SEEDS() -> list[bytes]:
    """A small tar of each format, with labels beside and apart, long names and links."""
    image = b"\xff\xd8\xff\xd9" * 3
    beside = [("1.jpg", image), ("1.cls", b"3"), ("2.png", image), ("2.json", b'{"label": 1}')]
    apart = [("a/1.jpg", image), ("a/2.jpg", image), ("a/1.cls", b"oak"), ("a/2.cls", b"ash")]
    odd = [
        ("ü" * 120 + ".jpg", image),
        ("x_1.5.jpg", image),
        ("x_1.7.jpg", image),
        ("n", b""),
    ]
    seeds = []
    for format in FORMATS:
        for members in (beside, apart, odd):
            out = io.BytesIO()
            with tarfile.open(fileobj=out, mode="w", format=format) as tar:
                for name, content in members:
                    if format == tarfile.USTAR_FORMAT:
                        name = name[-90:].lstrip("ü")
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    info.pax_headers = {"comment": "c"}
                    tar.addfile(info, io.BytesIO(content))
                link = tarfile.TarInfo("link")
                link.type, link.linkname = tarfile.SYMTYPE, "l" * 90
                tar.addfile(link)
            seeds.append(out.getvalue()[: 20 * 512])
            seeds.append(out.getvalue())
    return seeds


def run(data: bytes, folder: Path) -> None:
    """Everything that reads the headers of a tar.

    Args:
        data: of the file.
        folder: for files, empty; what is in it afterwards does not matter.
    """
    path = folder / "0.tar"
    path.write_bytes(data)
    key_in(data[:512])
    look_into(path)
    with contextlib.suppress(UserError):
        member_places(path)
    with contextlib.suppress(UserError):
        found = scan_tar(path)
        assert ((found.offset + found.size) <= len(data)).all()
        assert len(found.label) == len(found.offset)
        rows = np.zeros(len(found.offset), INDEX_DTYPE)
        rows["offset"], rows["size"] = found.offset, found.size
        assert tar_problem(path, rows) is None
    salvage(path, folder / "new.tar", None)


def extended(kind: bytes, size: int, text: bytes = b"") -> bytes:
    """An extended header that claims a size; `text` follows."""
    info = tarfile.TarInfo("x")
    info.size, info.type = size, kind
    body = text + bytes(-len(text) % 512)
    return info.tobuf(tarfile.GNU_FORMAT) + body


def record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    while len(text := b"%d %s=%s\n" % (length, key, value)) != length:
        length = len(text)
    return text


def file_of(size: int = 0, name: str = "1.jpg") -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT) + b"\xff" * size + bytes(-size % 512)

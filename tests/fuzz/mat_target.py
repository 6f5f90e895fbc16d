"""Fuzz target: meta.mat of ImageNet's development kit, with a ground truth that needs it."""

from __future__ import annotations

import contextlib
import struct
import zlib
from pathlib import Path

from moco_scale.data.tools.ilsvrc import read_ground_truth
from moco_scale.utils.errors import UserError

_IDS = {1: "n00000003", 2: "n00000001", 3: "n00000002"}
_DOUBLE, _CHAR, _STRUCT = 6, 4, 2  # classes of arrays
_INT8, _UINT16, _INT32, _UINT32, _DOUBLES, _MATRIX, _COMPRESSED = 1, 4, 5, 6, 9, 14, 15  # of data


def SEEDS() -> list[bytes]:
    """Return files as MATLAB writes them, compressed or not, in either order of bytes."""
    return [
        mat_file(_IDS, order, compressed) for order in ("<", ">") for compressed in (False, True)
    ]


def run(data: bytes, folder: Path) -> None:
    """Read one file; a UserError is an answer, anything else is not."""
    truth = folder / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("".join(f"{number}\n" for number in _IDS))
    (folder / "meta.mat").write_bytes(data)
    with contextlib.suppress(UserError):
        read_ground_truth(truth, [f"{name}.jpg" for name in "abc"])


def mat_file(ids: dict[int, str], order: str, compressed: bool) -> bytes:
    """A MATLAB 5 file with a struct array `synsets` of ILSVRC2012_ID and WNID."""

    def element(kind: int, data: bytes) -> bytes:
        padding = b"" if kind == _COMPRESSED else bytes(-len(data) % 8)
        return struct.pack(f"{order}2I", kind, len(data)) + data + padding

    def array(array_class: int, shape: tuple[int, ...], name: str, content: bytes) -> bytes:
        head = element(_UINT32, struct.pack(f"{order}2I", array_class, 0))
        head += element(_INT32, struct.pack(f"{order}{len(shape)}i", *shape))
        return element(_MATRIX, head + element(_INT8, name.encode()) + content)

    fields = [name.encode().ljust(32, b"\0") for name in ("ILSVRC2012_ID", "WNID")]
    content = element(_INT32, struct.pack(f"{order}i", 32)) + element(_INT8, b"".join(fields))
    for number, wnid in ids.items():
        value = element(_DOUBLES, struct.pack(f"{order}d", number))
        text = element(_UINT16, wnid.encode("utf-16-le" if order == "<" else "utf-16-be"))
        content += array(_DOUBLE, (1, 1), "", value)
        content += array(_CHAR, (1, len(wnid)), "", text)
    variable = array(_STRUCT, (len(ids), 1), "synsets", content)
    if compressed:
        variable = element(_COMPRESSED, zlib.compress(variable))
    mark = b"\x00\x01IM" if order == "<" else b"\x01\x00MI"
    return b"MATLAB 5.0 MAT-file".ljust(124) + mark + variable

"""Fuzz target: a list of images and their classes."""

from __future__ import annotations

import contextlib
from pathlib import Path

from moco_scale.data.tools.ilsvrc import read_ground_truth
from moco_scale.utils.errors import UserError

_IMAGES = ("a.jpg", "b c.jpg", "\u00e4.JPEG")


def SEEDS() -> list[bytes]:
    """Return lists in all forms that are known."""
    return [
        "a.jpg 0\r\nb c.jpg 1\r\n\u00e4.JPEG 2\r\n".encode("utf-8-sig"),
        "a,n00000001\nb c,n00000002\n\u00e4,n00000001\n".encode("utf-16"),
        "ImageId,PredictionString\na,n00000001 1 2 3 4\nb c,n00000002\n\u00e4,x\n".encode(),
        b"a\tgolden oak\n\nval/b c.jpg\tash\r\xe4.jpg\t\xff\n",
        b"oak\nash\noak\n",
        b"1\n2\n1\n",
    ]


def run(data: bytes, folder: Path) -> None:
    """Read one list; a UserError is an answer, anything else is not."""
    (folder / "truth.txt").write_bytes(data)
    with contextlib.suppress(UserError):
        read_ground_truth(folder / "truth.txt", _IMAGES)

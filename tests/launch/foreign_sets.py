"""Sets of shards that were written elsewhere, for tests."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from moco_scale.data.shards.protocols import Shards

FORMATS = {"jpg": "JPEG", "JPEG": "JPEG", "png": "PNG", "WebP": "WEBP"}


def image(seed: int, suffix: str = "jpg") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, FORMATS[suffix])
    return out.getvalue()


def write_tar(
    path: Path, members: list[tuple[str, bytes]], format: int = tarfile.GNU_FORMAT
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def samples(
    first: int, count: int, suffix: str = "jpg", label: str = "cls"
) -> list[tuple[str, bytes]]:
    members = []
    for i in range(first, first + count):
        members.append((f"{i:06d}.{suffix}", image(i, suffix)))
        if label == "cls":
            members.append((f"{i:06d}.cls", str(i % 3).encode()))
        elif label == "json":
            members.append((f"{i:06d}.json", json.dumps({"label": i % 3, "w": 8}).encode()))
        members.append((f"{i:06d}.txt", b"a caption"))
    return members


def foreign_set(folder: Path) -> Path:
    """Four training shards of 5 samples and one validation shard of 4, without an index."""
    for n, suffix in enumerate(FORMATS):
        write_tar(folder / f"set-train-{n:04d}.tar", samples(5 * n, 5, suffix))
    write_tar(folder / "set-validation-0000.tar", samples(100, 4))
    return folder


def contents(shards: Shards) -> list[tuple[bytes, int]]:
    return [(bytes(shards.read(i)), int(shards.labels[i])) for i in range(len(shards))]


def expected(first: int, count: int, suffix: str = "jpg") -> list[tuple[bytes, int]]:
    return [(image(i, suffix), i % 3) for i in range(first, first + count)]


ALL = [pair for n, suffix in enumerate(FORMATS) for pair in expected(5 * n, 5, suffix)]

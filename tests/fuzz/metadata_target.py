"""Fuzz target: the index of a checkpoint, and the tensors that it leads to."""

from __future__ import annotations

import contextlib
import tempfile
from functools import cache
from pathlib import Path

import torch

from moco_scale.checkpoints import checkpoint
from moco_scale.utils.errors import UserError


@cache
def _whole() -> dict[str, bytes]:
    """The files of a small checkpoint by name."""
    tensors = {
        "model.query.head.weight": torch.randn(3, 4),
        "model.key.conv": torch.randn(2, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        "queue.keys": torch.randn(7, 3).bfloat16(),
        "queue.pointer": torch.tensor(3),
    }
    rows = {"queue.keys": checkpoint.Rows(0, 7, 7)}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "step-00000004"
        checkpoint.save(
            folder, tensors, {"step": 4, "config": {"dim": 3}, "keep": False}, rows=rows
        )
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def whole(folder: Path, *, but: str) -> None:
    """Lay a small checkpoint into a folder, all files but one; once."""
    for name, content in _whole().items():
        if name != but and not (folder / name).exists():
            (folder / name).write_bytes(content)


def SEEDS() -> list[bytes]:
    """Indexes as they are written."""
    return [_whole()[checkpoint.INDEX]]


def run(data: bytes, folder: Path) -> None:
    """Read a checkpoint with this index."""
    whole(folder, but=checkpoint.INDEX)
    (folder / checkpoint.INDEX).write_bytes(data)
    with contextlib.suppress(UserError):
        checkpoint.shapes(folder)
    with contextlib.suppress(UserError):
        checkpoint.load(folder)

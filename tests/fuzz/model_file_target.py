"""Fuzz target: a file that eval.py takes."""

from __future__ import annotations

import contextlib
import io
import zipfile
from functools import cache
from pathlib import Path

import torch

from moco_scale.evaluation.pretrained import load_pretrained, read_model_file
from moco_scale.untrusted.tensor_files import StoredTensor
from moco_scale.utils.errors import UserError


@cache
def _file() -> bytes:
    """A file of the right form; its weights are few."""
    opt = {
        **{"model": "resnet18", "model_width": 1, "stem": "cifar", "head": "linear", "dim": 8},
        **{"image_size": 32, "patch_size": 0, "dataset": "images", "lr_decay_epochs": [120, 160]},
    }
    state = {
        "backbone.conv1.weight": torch.randn(8, 3, 3, 3),
        "backbone.bn1.num_batches_tracked": torch.tensor(3),
        "head.bias": torch.randn(8).bfloat16(),
    }
    stream = io.BytesIO()
    torch.save({"opt": opt, "epoch": 1, "step": 2, "model": state, "model_ema": state}, stream)
    return stream.getvalue()


def _with_pickle(content: bytes) -> bytes:
    """The same file with another pickle in it, under a checksum that is right."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(_file())) as old, zipfile.ZipFile(stream, "w") as new:
        for name in old.namelist():
            new.writestr(name, content if name.endswith("data.pkl") else old.read(name))
    return stream.getvalue()


def SEEDS() -> list[bytes]:
    """The file, and its pickle alone."""
    with zipfile.ZipFile(io.BytesIO(_file())) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        return [_file(), archive.read(name)]


def run(data: bytes, folder: Path) -> None:
    """Open a file, or one with this pickle; read its tensors, and ask for its encoder."""
    path = folder / "current.pth"
    path.write_bytes(data if data.startswith(b"PK") else _with_pickle(data))
    with contextlib.suppress(UserError):
        load_pretrained(path)
    with contextlib.suppress(UserError), read_model_file(path, "the file") as file:
        for section in file.content.values():
            if isinstance(section, dict):
                for tensor in section.values():
                    if isinstance(tensor, StoredTensor):
                        file.read(tensor)

"""Fuzz target: the plain values of a checkpoint."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

from metadata_target import _whole, whole

from moco_scale.checkpoints import checkpoint
from moco_scale.utils.errors import UserError


def SEEDS() -> list[bytes]:
    """One as it is written, one of an earlier version, one with all that a run keeps."""
    written = _whole()[checkpoint.META]
    earlier = {k: v for k, v in json.loads(written).items() if k != "own_crc32"}
    numbers = dict.fromkeys(
        ("loss", "chance_loss", "lr", "images_per_second", "data_wait_fraction", "more"), 0.5
    )
    full = earlier | {
        "config": {"dim": 3, "lr_decay_epochs": [120, 160], "aug": "v1", "symmetric": False},
        **{"data_fingerprint": "ab", "epoch": 1, "samples": 8, "processes": 2, "engine": "ddp"},
        "unlogged": {"record": {"step": 4, **numbers}, "line": "epoch 1/2 step 4/8"},
    }
    return [written, json.dumps(earlier).encode(), json.dumps(full, indent=1).encode()]


def run(data: bytes, folder: Path) -> None:
    """Read a checkpoint with this meta.json."""
    whole(folder, but=checkpoint.META)
    (folder / checkpoint.META).write_bytes(data)
    for read in (checkpoint.read_meta, checkpoint.verify, checkpoint.readable_meta):
        # What is said of an earlier version's is no part of this.
        with contextlib.suppress(UserError), contextlib.redirect_stderr(io.StringIO()):
            read(folder)

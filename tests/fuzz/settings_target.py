"""Fuzz target: a settings file, as JSON, TOML and YAML."""

from __future__ import annotations

import contextlib
from pathlib import Path

from moco_scale.config.command_line import parse
from moco_scale.utils.errors import UserError


def SEEDS() -> list[bytes]:
    """Return a file of each kind."""
    return [
        b'{"epochs": 3, "lr_decay_epochs": [1, 2], "symmetric": true, "aug": "v1"}',
        b'epochs = 3\nlr_decay_epochs = [1, 2]\nsymmetric = true\naug = "v1"\n',
        b"epochs: 3\nlr_decay_epochs: [1, 2]\nsymmetric: yes\nweight_decay: 1e-4\naug: v1\n",
    ]


def run(data: bytes, folder: Path) -> None:
    """Read one file; a UserError is an answer, anything else is not."""
    for ending in ("json", "toml", "yaml"):
        path = folder / f"settings.{ending}"
        path.write_bytes(data)
        with contextlib.suppress(UserError):
            parse(["--config", str(path)])

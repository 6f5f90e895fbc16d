"""Output folder of a demo: its marker, and reuse of an earlier run's files."""

import json
import shutil
from pathlib import Path
from typing import Any

from moco_scale.checkpoints import checkpoint
from moco_scale.config.schema import differences
from moco_scale.untrusted.demo import DemoSettings
from moco_scale.untrusted.documents import DocumentError, read_document
from moco_scale.untrusted.limits import SETTINGS_JSON
from moco_scale.utils.errors import UserError
from moco_scale.utils.files import write_atomically

MARKER = ".moco_scale-demo"
"""The file that says: this folder was made by a demo."""
REPLACEABLE = "Made by a moco_scale demo; the next one may delete it.\n"
SUMMARY = "summary.json"

_MADE_BEFORE_TRAINING = ("images", "official", "shards")
"""Folders of an output folder that come from the source alone."""


def claim(out: Path) -> None:
    """Make `out` an empty folder marked as a demo's; an earlier demo's files are deleted.

    Raises:
        UserError: It holds anything else, or cannot be written.
    """
    try:
        if out.is_dir() and any(out.iterdir()):
            marker = out / MARKER
            if not _is_replaceable(marker):
                raise UserError(
                    f"--output-dir {out} holds files that no demo made; "
                    "name another folder, or move them away"
                )
            shutil.rmtree(out.resolve())  # a link keeps pointing to what it points to
            out.resolve().mkdir()
        out.mkdir(parents=True, exist_ok=True)
        (out / MARKER).write_text(REPLACEABLE, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--output-dir {out} cannot be written: {error.strerror or error}"
        ) from None


def claim_or_continue(out: Path, images: dict[str, Any], train: dict[str, Any]) -> bool:
    """Make `out` this run's folder, or keep an interrupted run of the same settings.

    A trained model is never touched; shards of another source are made again.

    Args:
        out: the folder.
        images: settings of the shards, plain values by flag.
        train: settings of the training, likewise.

    Returns:
        Whether there is a run to continue.

    Raises:
        UserError: It holds another run (the message has the differences), a finished one, or
            anything else, or cannot be written.
    """
    marker = out / MARKER
    away = "name another folder (--output-dir; with make, OUT=FOLDER), or move that one away"
    try:
        if not out.is_dir() or not any(out.iterdir()):
            out.mkdir(parents=True, exist_ok=True)
            _mark(marker, images, train)
            return False
        saved = _settings_in(marker)
        if saved is None:
            raise UserError(f"--output-dir {out} holds something else; {away}")
        lines = differences(saved.images | saved.train, images | train)
        trained = (out / "current.pth").exists() or any(out.glob(f"checkpoints/{checkpoint.STEP}*"))
        if lines and trained:
            what = "\n".join(lines)
            raise UserError(f"--output-dir {out} holds a run with other settings:\n{what}\n{away}")
        if (out / SUMMARY).exists():
            raise UserError(f"--output-dir {out} holds a finished run; {away}")
        if saved.images != images:
            for name in _MADE_BEFORE_TRAINING:
                shutil.rmtree(out / name, ignore_errors=True)
        _mark(marker, images, train)
    except OSError as error:
        raise UserError(
            f"--output-dir {out} cannot be written: {error.strerror or error}"
        ) from None
    return True


def _is_replaceable(marker: Path) -> bool:
    """Tell whether a folder is marked as a demo's, by a file that is no link."""
    expected = REPLACEABLE.encode()
    if marker.is_symlink() or not marker.is_file() or marker.stat().st_size != len(expected):
        return False
    return marker.read_bytes() == expected


def _mark(marker: Path, images: dict[str, Any], train: dict[str, Any]) -> None:
    text = json.dumps({"images": images, "train": train}, indent=1, sort_keys=True)
    write_atomically(marker, text + "\n")


def _settings_in(marker: Path) -> DemoSettings | None:
    """Read the settings in a marker; None where there are none."""
    if not marker.is_file():
        return None
    try:
        return read_document(marker, DemoSettings, SETTINGS_JSON, "the demo's")
    except DocumentError:
        return None

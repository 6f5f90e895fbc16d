"""``results.json``: results of all evaluations in a folder, also of concurrent ones."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from moco_scale.data.shards.index_place import alone
from moco_scale.observe.side_files import json_text
from moco_scale.untrusted.documents import DocumentError, read_document
from moco_scale.untrusted.limits import SETTINGS_JSON
from moco_scale.untrusted.results import Results
from moco_scale.utils.errors import UserError
from moco_scale.utils.files import require_writable, write_atomically
from moco_scale.utils.log import log

NAME = "results.json"


def require_usable(folder: Path) -> None:
    """Make the folder, and check that it is writable and its results readable.

    Raises:
        UserError: They are not.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output-dir {folder} is a file; name a folder")
    try:
        require_writable(folder)
    except OSError as error:
        raise UserError(
            f"--output-dir {folder} cannot be written: {error.strerror or error}; "
            "choose another folder or fix its permissions"
        ) from None
    try:
        _read(folder / NAME)
    except DocumentError as error:
        raise UserError(
            f"{error}: not a result of eval.py, or damaged; move it away, or choose another "
            "--output-dir"
        ) from None


def add(folder: Path, result: dict[str, Any]) -> None:
    """Write a result, and under ``all`` the newest of each ``variant``.

    The file is read again, as other evaluations may have finished since. A damaged file is kept
    under another name.

    Raises:
        UserError: The file cannot be written.
    """
    path = folder / NAME
    with contextlib.suppress(OSError):  # the next lines report it
        folder.mkdir(parents=True, exist_ok=True)  # it may have been removed
    with alone(folder / f".{NAME}.lock", f"{path}: another evaluation writes it; waiting"):
        try:
            try:
                earlier = _read(path)
            except DocumentError as error:
                kept = _free_name(path)
                os.rename(path, kept)
                log.warning(f"{error}: kept as {kept.name}; a new file is begun")
                earlier = {}
            results = {**earlier, result["variant"]: result}
            text = json_text({**result, "all": results}, indent=1)
            write_atomically(path, text + "\n", shared=True)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def _read(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    return read_document(path, Results, SETTINGS_JSON, "--output-dir holds").all


def _free_name(path: Path) -> Path:
    number = 1
    while (kept := path.with_name(f"{path.name}.kept-{number}")).exists():
        number += 1
    return kept

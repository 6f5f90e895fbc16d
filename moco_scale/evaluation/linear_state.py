"""What a linear evaluation leaves behind after each epoch, to continue from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moco_scale import distributed
from moco_scale.errors import UserError
from moco_scale.files import save_atomically


def save(path: Path, state: dict[str, Any]) -> None:
    """Replace the state in a file; every rank calls it, the main one writes.

    Raises:
        UserError: it cannot be written; the earlier state is untouched.
    """
    failure = None
    if distributed.is_main():
        try:
            save_atomically(path, state)
        except (OSError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            failure = UserError(f"cannot write {path}: {reason}; make room, then start again")
    failure = distributed.first_error(failure)
    if failure is not None:
        raise failure


def load(path: Path, identity: dict[str, Any], resume: str) -> dict[str, Any] | None:
    """The state in a file, which the main process reads for all; None without the file.

    Args:
        path: see :func:`save`.
        identity: what must agree with the state's ``identity``.
        resume: ``"auto"``, or ``"none"`` to refuse one that is there.

    Raises:
        UserError: the state belongs to something else (each difference is named), is damaged, or
            is not wanted.
    """
    state, failure = None, None
    if distributed.is_main():
        try:
            state = _read(path, identity, resume)
        except UserError as error:
            failure = error
    failure = distributed.first_error(failure)
    if failure is not None:
        raise failure
    return distributed.broadcast_object(state)


def _read(path: Path, identity: dict[str, Any], resume: str) -> dict[str, Any] | None:
    if not path.exists():
        return None
    away = "choose another --output-dir, or move that file away"
    if resume == "none":
        raise UserError(f"--resume none: {path} holds a linear evaluation; {away}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = dict(state["identity"])
    except Exception:  # whatever a damaged or foreign file makes of the reader
        raise UserError(f"{path} is damaged or something else; {away}") from None
    different = [
        f"  {name}: {saved.get(name)!r} there, {identity.get(name)!r} now"
        for name in sorted(saved.keys() | identity.keys())
        if saved.get(name) != identity.get(name)
    ]
    if different:
        lines = "\n".join(different)
        raise UserError(f"{path} belongs to another linear evaluation:\n{lines}\n{away}")
    return state

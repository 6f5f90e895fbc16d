"""What a linear evaluation leaves behind after each epoch, to continue from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moco_scale import together
from moco_scale.errors import UserError
from moco_scale.files import failure_reason, save_atomically
from moco_scale.messages import say


def save(path: Path, state: dict[str, Any]) -> None:
    """Replace the state in a file; every rank calls it, the main one writes.

    Raises:
        UserError: it cannot be written; the earlier state is untouched.
    """
    together.on_main(lambda: _write(path, state))


def _write(path: Path, state: dict[str, Any]) -> None:
    try:
        save_atomically(path, state)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot write {path}: {failure_reason(error)}; make room, then start again"
        ) from None


def load(
    path: Path, identity: dict[str, Any], described: dict[str, str], resume: str
) -> dict[str, Any] | None:
    """The state in a file, which the main process reads for all; None where there is none.

    A finished evaluation of something else is none: the new one may take its place, and this is
    said.

    Args:
        path: see :func:`save`.
        identity: what must agree with the state's ``identity``.
        described: for people, what values of `identity` that say nothing mean.
        resume: ``"auto"``, or ``"none"`` to refuse one that is there.

    Raises:
        UserError: the state belongs to something else that is not finished (each difference is
            named), is damaged, or is not wanted.
    """
    return together.on_main(lambda: _read(path, identity, described, resume))


def _read(
    path: Path, identity: dict[str, Any], described: dict[str, str], resume: str
) -> dict[str, Any] | None:
    if not path.exists():
        return None
    away = "choose another --output-dir, or move that file away"
    if resume == "none":
        raise UserError(f"--resume none: {path} holds a linear evaluation; {away}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = dict(state["identity"])
        finished = len(state["history"]) >= saved["epochs"]
    except Exception:  # whatever a damaged or foreign file makes of the reader
        raise UserError(f"{path} is damaged or something else; {away}") from None
    meanings = state.get("described", {})
    different = [
        f"  {name}: {meanings.get(name, repr(saved.get(name)))} there, "
        f"{described.get(name, repr(identity.get(name)))} now"
        for name in sorted(saved.keys() | identity.keys())
        if saved.get(name) != identity.get(name)
    ]
    if not different:
        return state
    lines = "\n".join(different)
    if not finished:
        raise UserError(
            f"{path} belongs to another linear evaluation, which is not finished:\n{lines}\n{away}"
        )
    say(
        f"{path} is of another linear evaluation, which is finished; this one takes its place:\n"
        f"{lines}"
    )
    return None

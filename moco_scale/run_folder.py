"""The output folder of a run: whether it may be written, what it resumes from, what it keeps."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from moco_scale import checkpoint, distributed
from moco_scale.config import Config, differences
from moco_scale.errors import UserError
from moco_scale.files import failure_reason, save_atomically, write_atomically

_STEP = re.compile(r"step-(\d{8,})")


class RunFolder:
    """``--output-dir`` of one run.

    Attributes:
        path: the folder.
        metrics: its ``metrics.jsonl``.
    """

    def __init__(self, config: Config, data_fingerprint: str) -> None:
        self.path = Path(config.run.output_dir)
        self.metrics = self.path / "metrics.jsonl"
        self._config, self._fingerprint = config, data_fingerprint

    def prepare(self) -> Path | None:
        """Make the folder and decide what to start from; all ranks call it.

        Returns:
            The checkpoint to resume from; None to start from the beginning.

        Raises:
            UserError: the folder cannot be written, holds another run, or ``--resume`` names
                something that is not there or does not agree with the flags.
        """
        start, failure = None, None
        if distributed.is_main():
            try:
                start = self._prepare()
            except UserError as error:
                failure = error
            except OSError as error:
                failure = UserError(
                    f"--output-dir {self.path} cannot be written: {error.strerror}; "
                    "choose another folder or fix its permissions"
                )
        failure = distributed.first_error(failure)
        if failure is not None:
            raise failure
        return distributed.broadcast_object(start)

    def _prepare(self) -> Path | None:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--output-dir {self.path} is a file; name a folder")
        start = self._resume_from(self._config.run.resume)
        self.path.mkdir(parents=True, exist_ok=True)
        if start is not None:
            self._require_agreement(checkpoint.read_meta(start), start)
        for left in (self.path / "checkpoints").glob(".step-*"):
            shutil.rmtree(left, ignore_errors=True)  # of a process killed while saving
        content = {**self._config.flat(), "data_fingerprint": self._fingerprint}
        write_atomically(self.path / "config.json", json.dumps(content, indent=1) + "\n")
        return start

    def _resume_from(self, wish: str) -> Path | None:
        own = self.checkpoints()
        if wish == "auto":
            if not own and (self.path / "current.pth").exists():
                raise UserError(
                    f"--output-dir {self.path} holds a model but no checkpoint to resume from; "
                    "choose another --output-dir, or move that one away"
                )
            return own[-1] if own else None
        if wish == "none":
            if own or (self.path / "current.pth").exists():
                raise UserError(
                    f"--resume none: {self.path} already holds a run; drop the flag to continue "
                    "it, choose another --output-dir, or move the folder away"
                )
            return None
        named = Path(wish)
        if (named / "checkpoints").is_dir():
            inside = _complete_checkpoints(named)
            if not inside:
                raise UserError(f"--resume {wish}: the run in it has no complete checkpoint")
            named = inside[-1]
        checkpoint.read_meta(named)
        newer = [c for c in own if c.resolve() != named.resolve() and _step_of(c) > _step_of(named)]
        foreign = [c for c in own if named.resolve().parent != c.resolve().parent]
        if newer or foreign:
            raise UserError(
                f"--resume {wish}: --output-dir {self.path} holds "
                f"{'newer checkpoints' if newer else 'another run'} "
                f"({(newer or foreign)[-1].name}), which continuing would overwrite; "
                "choose another --output-dir"
            )
        return named

    def _require_agreement(self, meta: dict[str, Any], start: Path) -> None:
        lines = differences(meta["config"], self._config.defining())
        if meta["data_fingerprint"] != self._fingerprint:
            lines.append(f"  --data-dir: other pictures in {self._config.data.data_dir} now")
        if lines:
            raise UserError(
                f"the flags do not agree with the run that {start} belongs to:\n"
                + "\n".join(lines)
                + "\nuse that run's values to continue it, or another --output-dir for a new run"
            )

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints in this folder, oldest first."""
        return _complete_checkpoints(self.path)

    def save(
        self,
        step: int,
        tensors: dict[str, Tensor],
        meta: dict[str, Any],
        model: dict[str, Any],
        keep: bool,
    ) -> None:
        """Write a checkpoint, point ``latest`` at it, replace ``current.pth``, drop old ones.

        Args:
            step: of the run.
            tensors: global state.
            meta: plain values; the configuration is added.
            model: content of ``current.pth``.
            keep: keep this checkpoint for good.

        Raises:
            UserError: something cannot be written; earlier checkpoints are untouched.
        """
        folder = self.path / "checkpoints" / f"step-{step:08d}"
        if not folder.exists():
            meta = {
                **meta,
                "config": self._config.defining(),
                "data_fingerprint": self._fingerprint,
                "keep": keep,
            }
            checkpoint.save(folder, tensors, meta)
        failure = None
        if distributed.is_main():
            try:
                write_atomically(folder.parent / "latest", folder.name + "\n")
                save_atomically(self.path / "current.pth", model)
                self._drop_old()
            except (OSError, RuntimeError) as error:
                failure = UserError(
                    f"cannot write to {self.path}: {failure_reason(error)}; checkpoint "
                    f"{folder.name} is complete: make room, then start again"
                )
        failure = distributed.first_error(failure)
        if failure is not None:
            raise failure

    def _drop_old(self) -> None:
        passing = [c for c in self.checkpoints() if not _is_kept(c)]
        for old in passing[: -self._config.run.keep_checkpoints]:
            # So that a kill leaves no half-deleted checkpoint.
            os.rename(old, old.with_name(f".{old.name}.old"))
        for trash in (self.path / "checkpoints").glob(".step-*.old"):
            shutil.rmtree(trash, ignore_errors=True)

    def forget_metrics_after(self, step: int) -> int:
        """Drop metric lines of steps that will be run again; returns how many were dropped."""
        if not self.metrics.exists():
            return 0
        lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line.rstrip("\n") + "\n" for line in lines if _is_up_to(line, step)]
        if kept != lines:
            write_atomically(self.metrics, "".join(kept))
        return len(lines) - len(kept)


def _is_kept(folder: Path) -> bool:
    try:
        return bool(checkpoint.read_meta(folder)["keep"])
    except UserError:
        return True  # damaged: no reason to stop a run, and for people to look at


def _is_up_to(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False  # the last line of a killed run may be cut short


def _complete_checkpoints(run: Path) -> list[Path]:
    root = run / "checkpoints"
    if not root.is_dir():
        return []
    found = [
        p for p in root.iterdir() if _STEP.fullmatch(p.name) and (p / checkpoint.META).is_file()
    ]
    return sorted(found, key=_step_of)


def _step_of(folder: Path) -> int:
    match = _STEP.fullmatch(folder.name)
    return int(match.group(1)) if match else -1

"""Output folder of a run: its lock, resuming, and kept checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from moco_scale.checkpoints import checkpoint
from moco_scale.checkpoints.background import BackgroundSaver
from moco_scale.config.resolve import check_shuffle_group
from moco_scale.config.schema import Config, differences
from moco_scale.distributed import collectives, consensus
from moco_scale.distributed.run_lock import RunLock, claim_for_all
from moco_scale.observe import metrics_file
from moco_scale.observe.side_files import SideFile
from moco_scale.untrusted.tensor_files import TensorFile
from moco_scale.utils.errors import UserError
from moco_scale.utils.files import failure_reason, save_atomically, write_atomically
from moco_scale.utils.log import log
from moco_scale.utils.text import printable

T = TypeVar("T")
LOCK = ".lock"
"""Name of the file in an output folder whose lock keeps other runs out."""


class RunFolder:
    """``--output-dir`` of one run.

    Attributes:
        path: the folder.
        metrics: its ``metrics.jsonl``.
        current: its ``current.pth``.
        lock: keeps other runs out.
        config: complete after :meth:`prepare`.
    """

    def __init__(self, config: Config, data_fingerprint: str) -> None:
        self.path = Path(config.run.output_dir)
        self.metrics = self.path / metrics_file.NAME
        self.current = self.path / "current.pth"
        self._config_file = self.path / "config.json"
        self.config, self._fingerprint = config, data_fingerprint
        self.lock = RunLock(self.path / LOCK)
        self._saver, self._newest = BackgroundSaver(config.run.async_save), ""

    def prepare(self) -> Path | None:
        """Make the folder and choose the checkpoint to start from; all ranks call it.

        Returns:
            The checkpoint to resume from; None to start from the beginning.

        Raises:
            UserError: The folder cannot be written, is not the same one for all ranks or holds
                another run, or the checkpoint of ``--resume`` is missing or of other flags.
            StoppedEarly: A run on another host writes there.
        """
        shuffled = _shuffled_here(self.config)

        consensus.broadcast_from_main(lambda: self._writing(self._make))
        claim_for_all(self.lock)
        # Look only now, when nobody else can change the folder.
        start, self.config = consensus.broadcast_from_main(
            lambda: self._writing(lambda: self._prepare(shuffled))
        )
        self._require_shared()
        return start

    def begin(self, step: int) -> int:
        """Start a run that is set up: write ``config.json``, tidy up; all ranks call it.

        Returns:
            Number of dropped metric lines, of steps that will run again.

        Raises:
            UserError: The folder cannot be written.
        """
        return consensus.broadcast_from_main(lambda: self._writing(lambda: self._begin(step)))

    def _writing(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except OSError as error:
            raise UserError(
                f"--output-dir {self.path} cannot be written: {error.strerror or error}; "
                "choose another folder or fix its permissions"
            ) from error

    def _make(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--output-dir {self.path} is a file; name a folder")
        if self.config.run.resume not in ("auto", "none"):
            _named(self.config.run.resume)  # a mistake here must make no folder
        self.path.mkdir(parents=True, exist_ok=True)

    def _prepare(self, shuffled: int) -> tuple[Path | None, Config]:
        start = self._resume_from(self.config.run.resume)
        meta = {} if start is None else checkpoint.read_meta(start)
        if shuffled:
            # The group of the run's start, whatever a node holds now.
            group = (meta.get("config") or {}).get("shuffle_group") or shuffled
            contrast = dataclasses.replace(self.config.contrast, shuffle_group=group)
            self.config = dataclasses.replace(self.config, contrast=contrast)
            check_shuffle_group(self.config)
        if start is not None:
            self._require_same_run(meta, start)
        return start, self.config

    def _begin(self, step: int) -> int:
        for left in (self.path / "checkpoints").glob(f".{checkpoint.STEP}*"):
            shutil.rmtree(left, ignore_errors=True)  # left by a process killed while saving
        try:
            self._write_config()
        except OSError as error:
            if not self._config_file.is_file():
                raise  # a new run, which has nothing to lose yet
            log.warning(
                f"cannot write {self._config_file}: {error.strerror or error}; it stays as it was, "
                "and training continues"
            )
        try:
            return metrics_file.forget_after(self.metrics, step)
        except OSError as error:
            log.warning(
                f"cannot rewrite {self.metrics}: {error.strerror or error}; it will have repeated "
                "steps twice, and training continues"
            )
            return 0

    def _write_config(self) -> None:
        content = {**self.config.flat(), "data_fingerprint": self._fingerprint}
        write_atomically(self._config_file, json.dumps(content, indent=1) + "\n")

    def hold(self) -> None:
        """Check, before rank 0 writes, that the folder is this run's; remake a removed one.

        Raises:
            UserError: Another run has taken the folder.
            OSError: The folder cannot be made.
        """
        if self.lock.hold():
            log.warning(
                f"--output-dir {self.path} was removed during the run: it is made again, without "
                "its former content"
            )
            with contextlib.suppress(OSError):
                self._write_config()

    def side_file(
        self, name: str, warn: Callable[[str], None] = log.warning, head: bytes = b""
    ) -> SideFile:
        """Make a file that rank 0 appends to while training."""
        return SideFile(self.path / name, head, self.hold, warn)

    def _require_shared(self) -> None:
        """Check that all ranks see rank 0's folder: each writes its share of every checkpoint."""
        mark = collectives.broadcast_object(self.lock.mark)

        def look() -> None:
            # Not on rank 0: a process that closes a file loses its lock.
            if not collectives.is_main() and _content(self.lock.path) != mark:
                raise UserError(
                    f"--output-dir {self.path} is another folder here than on rank 0: name one on "
                    "a file system that all hosts share"
                )
            if not os.access(self.path, os.W_OK):
                raise UserError(f"--output-dir {self.path} cannot be written from here")

        consensus.raise_on_all_ranks(look)

    def release(self) -> None:
        """Release the lock."""
        self.lock.release()

    def _resume_from(self, wish: str) -> Path | None:
        own = self.checkpoints()
        if wish == "auto":
            if not own and self.current.exists():
                raise UserError(
                    f"--output-dir {self.path} holds a model but no checkpoint to resume from; "
                    "choose another --output-dir, or move that one away"
                )
            if own:
                self._require_whole(own)
            return own[-1] if own else None
        if wish == "none":
            if own or self.current.exists():
                raise UserError(
                    f"--resume none: {self.path} already holds a run; drop the flag to continue "
                    "it, choose another --output-dir, or move the folder away"
                )
            return None
        named = _named(wish)
        checkpoint.verify(named)
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

    def _require_whole(self, own: list[Path]) -> None:
        try:
            checkpoint.verify(own[-1])
        except UserError as error:
            before = f"continue from {own[-2].name}" if len(own) > 1 else "start over"
            raise UserError(f"{error}; move {own[-1]} away to {before}") from None

    def _require_same_run(self, meta: dict[str, Any], start: Path) -> None:
        if not isinstance(meta.get("config"), dict):
            raise UserError(f"{start} lacks the configuration of its run")
        lines = differences(meta["config"], self.config.defining())
        if meta.get("data_fingerprint") != self._fingerprint:
            lines.append(f"  --data-dir: other images in {self.config.source} now")
        if lines:
            raise UserError(
                f"the flags differ from those of the run of {start}:\n"
                + "\n".join(lines)
                + "\nuse that run's values to continue it, or another --output-dir for a new run"
            )

    def not_finite(self, step: int, what: str) -> UserError:
        """Make the error that ends a run with non-finite values."""
        self.finish_saving()
        return UserError(
            f"stopped at step {step}: {what}; lower --base-lr or lengthen --warmup-epoch; "
            f"last good checkpoint: {self.last_good()}"
        )

    def last_good(self) -> str:
        """Name the newest complete checkpoint; state that is not finite is never saved."""
        # Asked first: a save that ends meanwhile is then among those listed.
        coming = f"; {self._newest} is being written" if self._saver.busy else ""
        saved = self.checkpoints()
        return (str(saved[-1]) if saved else "none") + coming

    def checkpoints(self) -> list[Path]:
        """List complete checkpoints in this folder, oldest first."""
        return complete_checkpoints(self.path)

    def save(
        self,
        step: int,
        tensors: dict[str, Tensor],
        model: dict[str, str],
        meta: dict[str, Any],
        keep: bool,
        rows: Mapping[str, checkpoint.Rows] = checkpoint.NO_ROWS,
    ) -> None:
        """Write a checkpoint, point ``latest`` at it, replace ``current.pth``, drop old ones.

        All ranks call it. With ``--async-save`` it returns when the tensors are copied; an error
        is then logged at once, shows in :meth:`save_failed`, and is raised by the next call or by
        :meth:`finish_saving`.

        Args:
            step: of the run.
            tensors: global state by name: this rank's own, and on rank 0 the whole model.
            model: names in ``current.pth`` of tensors that rank 0 writes there, such as
                ``"model.backbone.conv1.weight"``; the word before the first dot is a section.
            meta: plain values; the configuration is added.
            keep: keep this checkpoint for good.
            rows: this rank's rows of sharded tensors.

        Raises:
            UserError: A file cannot be written; earlier checkpoints are untouched.
        """
        folder = self.path / "checkpoints" / f"{checkpoint.STEP}{step:08d}"
        meta = {
            **meta,
            "config": self.config.defining(),
            "data_fingerprint": self._fingerprint,
            "keep": keep,
        }

        def write(copies: dict[str, Tensor], group: Any) -> None:
            owned = {
                n: t
                for n, t in copies.items()
                if n in rows or checkpoint.owner(n) == collectives.rank()
            }
            consensus.raise_on_all_ranks(hold, group)
            checkpoint.save(folder, owned, meta, group, rows)
            consensus.raise_on_all_ranks(
                lambda: publish(copies) if collectives.is_main() else None, group
            )

        def hold() -> None:
            if collectives.is_main():
                self._writing(self.hold)

        def publish(copies: dict[str, Tensor]) -> None:
            try:
                write_atomically(folder.parent / "latest", folder.name + "\n")
                save_atomically(self.current, self._model(copies, model, meta))
                self._drop_old()
            except Exception as error:  # whatever it is: the others wait for it
                where = getattr(error, "filename2", None) or self.path
                raise UserError(
                    f"cannot write to {where}: {failure_reason(error)}; checkpoint "
                    f"{folder.name} is complete: make room, then start again"
                ) from error

        self._newest = folder.name
        self._saver.start(tensors, write)

    def _model(
        self, tensors: dict[str, Tensor], names: dict[str, str], meta: dict[str, Any]
    ) -> dict[str, Any]:
        """Build the content of ``current.pth``, on the CPU, so that reading it needs no GPU."""
        content: dict[str, Any] = {
            "opt": self.config.flat(),
            "epoch": meta["epoch"],
            "step": meta["step"],
        }
        for name, place in names.items():
            section, _, rest = place.partition(".")
            content.setdefault(section, {})[rest] = tensors[name].cpu()
        return content

    def is_current(self, step: int) -> bool:
        """Check that ``current.pth`` is of this step; all ranks call it."""

        def look() -> bool:
            try:
                with TensorFile(self.current) as file:
                    content = file.content
            except (OSError, UserError):  # missing or damaged
                return False
            return isinstance(content, dict) and content.get("step") == step

        return consensus.broadcast_from_main(look)

    def write_current(
        self, tensors: dict[str, Tensor], names: dict[str, str], meta: dict[str, Any]
    ) -> None:
        """Replace ``current.pth``; see :meth:`save`; all ranks call it.

        Raises:
            UserError: The file cannot be written.
        """

        def write() -> None:
            try:
                save_atomically(self.current, self._model(tensors, names, meta))
            except (OSError, RuntimeError) as error:  # the latter is torch's for a full disk
                raise UserError(
                    f"cannot write {self.current}: {failure_reason(error)}; make room, then start "
                    "again"
                ) from error

        consensus.broadcast_from_main(write)

    def save_failed(self) -> bool:
        """Tell whether a background save failed on this rank: :meth:`finish_saving` raises it."""
        return self._saver.failed

    def finish_saving(self, timeout: float | None = None) -> None:
        """Wait for the save under way, or so many seconds; all ranks call it.

        Raises:
            UserError: The last save failed.
        """
        self._saver.wait(timeout)

    def _drop_old(self) -> None:
        passing = [c for c in self.checkpoints() if not _is_kept(c)]
        for old in passing[: -self.config.run.keep_checkpoints]:
            # So that a kill leaves no half-deleted checkpoint.
            os.rename(old, old.with_name(f".{old.name}.old"))
        for trash in (self.path / "checkpoints").glob(f".{checkpoint.STEP}*.old"):
            shutil.rmtree(trash, ignore_errors=True)

    def is_own(self, folder: Path) -> bool:
        """Tell whether a checkpoint is in this folder."""
        return folder.resolve().parent == (self.path / "checkpoints").resolve()

    def is_logged(self, step: int) -> bool:
        """Tell whether the metrics have a line of this step; all ranks call it."""
        return consensus.broadcast_from_main(lambda: metrics_file.has_step(self.metrics, step))


def _content(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _shuffled_here(config: Config) -> int:
    """Return samples of one node, if ``--shuffle-group`` is left to the hardware, else 0."""
    contrast = config.contrast
    if contrast.shuffle_bn != "node" or contrast.shuffle_group:
        return 0
    ranks = consensus.raise_on_all_ranks(collectives.ranks_per_node)
    return config.optim.batch_size // collectives.world_size() * ranks


def _is_kept(folder: Path) -> bool:
    try:
        return bool(checkpoint.read_meta(folder).get("keep", True))
    except UserError:
        return True  # damaged: no reason to stop a run, and people may want to look at it


def _named(wish: str) -> Path:
    """Find the checkpoint of ``--resume``, named itself or by its run. Raises UserError."""
    named = Path(wish)
    if not wish.strip():
        raise UserError("--resume is empty: name a checkpoint, or a run's output folder")
    try:
        if (named / "checkpoints").is_dir():
            inside = complete_checkpoints(named)
            if not inside:
                raise UserError(f"--resume {wish}: the run in it has no complete checkpoint")
            named = inside[-1]
        checkpoint.read_meta(named)
    except OSError as error:
        raise UserError(f"--resume {printable(wish)}: {error.strerror or error}") from None
    return named


def complete_checkpoints(run: Path) -> list[Path]:
    """List the complete checkpoints of a run's folder, oldest first; it resumes from the newest."""
    root = run / "checkpoints"
    if not root.is_dir():
        return []
    found = [
        p
        for p in root.iterdir()
        if checkpoint.STEP_FOLDER.fullmatch(p.name) and (p / checkpoint.META).is_file()
    ]
    return sorted(found, key=_step_of)


def _step_of(folder: Path) -> int:
    match = checkpoint.STEP_FOLDER.fullmatch(folder.name)
    return int(match.group(1)) if match else -1
